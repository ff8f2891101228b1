"""Normalizations are found anywhere in a data pipeline or model, without calling the project's code."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from lightning_normgeo.robustness.inputs.normalization_transforms import model_normalization, pipeline_normalizations

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
FIRST = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SECOND = ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
THIRD = ((0.5,), (0.25,))


class ExplosionError(Exception):
    pass


def explode(*args, **kwargs):
    raise ExplosionError("something of the project was called")


class Untouchable(Dataset):
    """A data set whose samples must not be read."""

    def __init__(self, transform=None, **more):
        self.transform = transform
        for name, value in more.items():
            setattr(self, name, value)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        explode()


class Wrapper(Dataset):
    """A common wrapper: another data set and a transform, under arbitrary attribute names."""

    def __init__(self, inner, step=None, names=("dataset", "transform")):
        setattr(self, names[0], inner)
        if step is not None:
            setattr(self, names[1], step)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        explode()


class Slotted:
    __slots__ = ("inner", "missing")

    def __init__(self, inner):
        self.inner = inner


class Callable:
    def __init__(self, what):
        self._hidden = what

    def __call__(self, image):
        explode()

    def method(self, image):
        explode()


class V1(v1.Normalize):
    """Transform with the class name Normalize."""

    forward = explode


V1.__name__ = "Normalize"


def found(thing):
    return [(mean, std) for mean, std, _ in pipeline_normalizations(thing)]


def normalize(constants=FIRST):
    return v1.Normalize(*constants)


# --- wherever it is ---------------------------------------------------------------------------------------------------


def closure(step):
    return lambda image: step(image)


def two_closures(step):
    def outer(image):
        return inner(image)

    def inner(image):
        return step(image)

    return outer


def keyword_only(step):
    def apply(image, *, how=step):
        return how(image)

    return apply


def wrapped(step):
    @functools.wraps(step.__call__ if hasattr(step, "__call__") else step)  # noqa: B004
    def apply(*args):
        return step(*args)

    return apply


STEPS = {
    "v1.Compose": lambda step: v1.Compose([v1.ToTensor(), step]),
    "v1.Compose, first": lambda step: v1.Compose([step, v1.RandomHorizontalFlip()]),
    "v2.Compose": lambda step: v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), step]),
    "nn.Sequential": lambda step: nn.Sequential(nn.Identity(), step if isinstance(step, nn.Module) else Held(step)),
    "v1.RandomApply": lambda step: v1.RandomApply([step], p=1.0),
    "v2.RandomApply": lambda step: v2.RandomApply([step if isinstance(step, nn.Module) else Held(step)], p=1.0),
    "v1.RandomChoice": lambda step: v1.RandomChoice([step]),
    "v1.Lambda with a default": lambda step: v1.Lambda(lambda image, how=step: how(image)),
    "v2.Lambda with a closure": lambda step: v2.Lambda(lambda image: step(image)),
    "partial": lambda step: functools.partial(lambda how, image: how(image), step),
    "partial, by keyword": lambda step: functools.partial(lambda image, how: how(image), how=step),
    "partial of it": lambda step: functools.partial(step, 1),
    "closure": closure,
    "two closures": two_closures,
    "keyword-only default": keyword_only,
    "functools.wraps": wrapped,
    "lru_cache": lambda step: functools.lru_cache(closure(step)),
    "attribute": Callable,
    "bound method": lambda step: Callable(step).method,
    "bound __call__": lambda step: Callable(step).__call__,
    "slots": Slotted,
    "dict by split": lambda step: {"train": v1.ToTensor(), "val": step},
    "tuple": lambda step: (v1.ToTensor(), step),
    "set": lambda step: {step} if step.__hash__ else [step],
    "namespace": lambda step: SimpleNamespace(anything=step),
}


class Held(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, image):
        explode()


NAMES = st.tuples(
    st.sampled_from(["dataset", "base", "data", "subset", "ds", "inner", "_source", "hf_dataset"]),
    st.sampled_from(["transform", "transforms", "tf", "aug", "preprocess", "_fn", "pipeline", "eval_transform"]),
)
DATA = {
    "Subset": lambda data: Subset(data, range(8)),
    "ConcatDataset": lambda data: ConcatDataset([data]),
    "ConcatDataset, second": lambda data: ConcatDataset([Untouchable(), data]),
    "slots": lambda data: Wrapper(Slotted(data), names=("held", "")),
    "list of data sets": lambda data: Wrapper([data], names=("datasets", "")),
    "dict of data sets": lambda data: Wrapper({"val": data}, names=("splits", "")),
}
LOADERS = {
    "loader": lambda data: DataLoader(data, batch_size=4),
    "shuffling loader": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "loader without batches": lambda data: DataLoader(data, batch_size=None),
    "list of loaders": lambda data: [DataLoader(data)],
    "dict of loaders": lambda data: {"a": DataLoader(Untouchable()), "b": DataLoader(data)},
    "combined loader": lambda data: CombinedLoader([DataLoader(data)], "sequential"),
    "combined dict": lambda data: CombinedLoader({"a": DataLoader(data)}, "max_size_cycle"),
    "loader of one's own": lambda data: SimpleNamespace(dataset=data),
    "data set alone": lambda data: data,
}


@st.composite
def pipelines(draw):
    """Return a loader with a normalization somewhere inside, and the path to it."""
    step, path = draw(st.sampled_from([V1(*FIRST), v1.Normalize(*FIRST), v2.Normalize(*FIRST)])), []
    for name in draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=2)):
        step = STEPS[name](step)
        path.append(name)
    names = draw(NAMES)
    data = Wrapper(Untouchable(), step, names) if draw(st.booleans()) else Untouchable(**{names[1]: step})
    for name in draw(st.lists(st.sampled_from(sorted(DATA)), max_size=1)):
        data = DATA[name](data)
        path.append(name)
    loader = draw(st.sampled_from(sorted(LOADERS)))
    return LOADERS[loader](data), [*path, names, loader]


@PROPERTY
@given(pipelines())
def test_a_normalization_is_found_wherever_it_is(pipeline):
    loader, path = pipeline
    assert [tuple(map(pytest.approx, pair)) for pair in found(loader)] == [FIRST], path


@pytest.mark.parametrize("name", STEPS)
def test_every_way_to_hold_a_step_is_looked_into(name):
    assert found(DataLoader(Untouchable(STEPS[name](normalize())))) == [FIRST]


@pytest.mark.parametrize("name", [name for name in STEPS if name not in ("dict by split", "tuple", "set")])
def test_a_normalizing_collate_function_is_found(name):
    step = STEPS[name](normalize())
    collate = step if callable(step) else Callable(step)
    assert found(DataLoader(Untouchable(), collate_fn=collate)) == [FIRST]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_loader_and_data_set_is_looked_into(name, kind):
    assert found(LOADERS[name](DATA[kind](Untouchable(normalize())))) == [FIRST]


@pytest.mark.parametrize("inside", ["class attribute", "transform of the class"])
def test_what_all_instances_of_a_class_share_is_found(inside):
    class Shared(Untouchable):
        steps = v1.Compose([v1.ToTensor(), normalize()])

        def __init__(self):
            if inside != "class attribute":
                self.transform = self.steps

    assert found(DataLoader(Shared())) == [FIRST]


def test_slots_of_a_base_class_are_looked_into():
    class Child(Slotted):
        __slots__ = ()

    assert found(Child(normalize())) == [FIRST]


def test_iterable_data_sets_are_looked_into():
    class Stream(IterableDataset):
        def __init__(self):
            self.pipeline = v1.Compose([normalize()])

        def __iter__(self):
            explode()

    assert found(DataLoader(Stream())) == [FIRST]


def test_a_deep_pipeline_is_found_by_its_shortest_path():
    """A loader's sampler has the data set too, three steps deeper than the loader itself."""
    data = Wrapper(Untouchable(), v1.Compose([v1.RandomApply([v1.Compose([normalize()])], p=1.0)]))
    data = Subset(ConcatDataset([data]), range(8))
    assert found(SimpleNamespace(dataset=data)) == [FIRST]
    assert found({"val": DataLoader(data)}) == [FIRST]


def test_constants_may_be_arrays_tensors_and_single_numbers():
    class Normalize:
        def __init__(self, mean, std):
            self.mean, self.std = mean, std

    for mean, std in (
        FIRST,
        map(list, FIRST),
        map(np.array, FIRST),
        map(torch.tensor, FIRST),
        (torch.tensor(FIRST[0]).view(1, 3, 1, 1), torch.tensor(FIRST[1], dtype=torch.float64).view(3, 1, 1)),
        (nn.Parameter(torch.tensor(FIRST[0])), nn.Parameter(torch.tensor(FIRST[1]))),
    ):
        [(means, stds)] = found(Normalize(mean, std))
        assert means == pytest.approx(FIRST[0], abs=1e-7)
        assert stds == pytest.approx(FIRST[1], abs=1e-7)
    assert found(Normalize(0.5, 0.25)) == [THIRD]
    assert found(Normalize((0.5,), 0.25)) == [THIRD]
    assert found(Normalize((0.1, 0.2, 0.3), (0.5,))) == [((0.1, 0.2, 0.3), (0.5,) * 3)]
    assert found(Normalize(0.5, FIRST[1])) == [((0.5,) * 3, FIRST[1])]


# --- nothing of the project is called ---------------------------------------------------------------------------------


class Guarded(Dataset):
    """Object whose methods and properties all raise."""

    transform = property(explode)
    mean = property(explode)

    def __init__(self, inner):
        self.inner = inner

    __getitem__ = __len__ = __iter__ = __call__ = __eq__ = __bool__ = __contains__ = explode
    __hash__ = None


def test_nothing_of_the_project_is_called():
    untouchable = Untouchable(v1.Compose([explode, V1(*FIRST)]), target_transform=explode, loader=explode)
    assert found(Guarded(untouchable)) == [FIRST]
    assert found(SimpleNamespace(dataset=Guarded(untouchable), collate_fn=explode, worker_init_fn=explode)) == [FIRST]
    assert found([Guarded(Guarded(untouchable)), Guarded(None)]) == [FIRST]


def test_attributes_that_are_made_when_asked_for_are_not_asked_for():
    asked = []

    class Lazy(Untouchable):
        def __getattr__(self, name):
            asked.append(name)
            raise AttributeError(name)

    assert found(DataLoader(Lazy(normalize()))) == [FIRST]
    assert [name for name in asked if not name.startswith("__")] == []


@pytest.mark.parametrize("error", [KeyError, RuntimeError, OSError])
def test_attributes_that_cannot_be_read_are_passed_over(error):
    class Closed(Untouchable):
        def __getattr__(self, name):
            raise error("the file is closed")

    assert found(SimpleNamespace(dataset=Closed(normalize()))) == [FIRST]


def test_what_a_class_shares_is_not_asked_either():
    class Closed:
        def __getattr__(self, name):
            raise OSError("the file is closed")

    class Shared(Untouchable):
        file = Closed()

    assert found(DataLoader(Shared(normalize()))) == [FIRST]


def test_an_attribute_hides_what_its_class_has():
    class Shared(Untouchable):
        transform = normalize(SECOND)

    assert found(DataLoader(Shared(normalize()))) == [FIRST]
    assert found(DataLoader(Shared())) == [], "it is None"


def test_modules_in_a_row_are_not_iterated():
    class Steps(nn.Sequential):
        __iter__ = __len__ = __getitem__ = explode

    steps = Steps(nn.Identity(), nn.Sequential(normalize()))
    assert found(DataLoader(Untouchable(steps))) == [FIRST]


def test_modules_in_a_row_may_hold_other_things():
    steps = nn.Sequential(nn.Identity())
    steps.after = like("Normalize", mean=FIRST[0], std=FIRST[1])
    assert found(DataLoader(Untouchable(steps))) == [FIRST]


def test_a_closure_over_what_is_not_there_yet_is_passed_over():
    def make():
        def apply(image):
            return later(image)

        if explode is None:
            later = None
        return apply

    assert found([make(), normalize()]) == [FIRST]
    assert found(DataLoader(Untouchable(normalize()), collate_fn=make())) == [FIRST]


def test_mappings_that_are_no_dict_are_not_read():
    class OnDisk(dict):
        pass

    class Store:
        def __getitem__(self, key):
            explode()

        keys = values = items = __iter__ = __len__ = explode

    assert found(Untouchable(normalize(), store=Store(), cache=OnDisk(a=1))) == [FIRST]


# --- it ends ----------------------------------------------------------------------------------------------------------


def test_cycles_end():
    data = Untouchable()
    data.myself, data.list, data.dict = data, [data], {"a": data}
    data.list.append(data.list)
    data.dict["b"] = data.dict
    data.method = data.__getitem__
    assert found(DataLoader(data)) == []
    data.last = normalize()
    assert found(DataLoader(data)) == [FIRST]


@pytest.mark.parametrize(
    "many",
    [
        lambda: [object() for _ in range(100_000)],
        lambda: [("a.png", k) for k in range(100_000)],
        lambda: [[k] for k in range(100_000)],
        lambda: [SimpleNamespace(k=[k]) for k in range(100_000)],
        lambda: {k: [k] for k in range(100_000)},
        lambda: {k: {"boxes": [[k]]} for k in range(100_000)},
        lambda: set(range(100_000)),
        lambda: range(10**12),
        lambda: np.zeros((100_000, 3)),
        lambda: torch.zeros(100_000, 3),
        lambda: b"0" * 100_000,
    ],
    ids=["objects", "pairs", "lists", "spaces", "dict", "boxes", "set", "range", "array", "tensor", "bytes"],
)
def test_long_data_is_not_searched_and_hides_nothing(many):
    data = Untouchable(samples=many())
    data.tf = normalize()
    assert found(DataLoader(data)) == [FIRST]
    assert found(TensorDataset(torch.zeros(8, 3))) == []


def test_a_chain_without_an_end_ends():
    first = link = SimpleNamespace()
    for _ in range(100_000):
        link.next = link = SimpleNamespace()
    assert found(first) == []
    while hasattr(first, "next"):  # released one by one: the interpreter would recurse too deeply
        first = first.__dict__.pop("next")


def test_a_tree_with_too_many_branches_ends():
    tree = [[[[k] for k in range(40)] for _ in range(40)] for _ in range(40)]
    assert found(tree) == []
    assert found(SimpleNamespace(transform=normalize(), rest=tree)) == [FIRST]


@pytest.mark.parametrize("nothing", [None, 3, "text", torch.zeros(3), int, Untouchable, torch, [], {}, print, np.zeros])
def test_nothing_is_found_in_nothing(nothing):
    assert found(nothing) == []


# --- kinds of normalizations ------------------------------------------------------------------------------------------


def like(name, **attributes):
    """Return an object with the class name and attributes of another library's."""
    return type(name, (), {"__init__": lambda self: self.__dict__.update(attributes), "__call__": explode})()


def tensors(scale=1.0):
    return {"mean": torch.tensor(FIRST[0]) * scale, "std": torch.tensor(FIRST[1]) * scale}


def module_like(name, **buffers):
    made = type(name, (nn.Module,), {})()
    for key, value in buffers.items():
        made.register_buffer(key, value)
    return made


ALBUMENTATIONS = {"mean": FIRST[0], "std": FIRST[1], "max_pixel_value": 255.0}


@pytest.mark.parametrize(
    "step",
    [
        v1.Normalize(*FIRST),
        v2.Normalize(*FIRST),
        v1.Normalize(*map(list, FIRST)),
        like("Normalize", **ALBUMENTATIONS, normalization="standard"),
        like("Normalize", **ALBUMENTATIONS),
        like("Normalize", **(ALBUMENTATIONS | {"max_pixel_value": 1.0}), normalization="standard"),
        like("Normalize", flags=tensors(), p=1.0),
        module_like("Normalize", **tensors()),
        module_like("ImageNormalizer", **tensors()),
        like("NormalizeIntensity", subtrahend=list(FIRST[0]), divisor=list(FIRST[1]), nonzero=False),
        like("NormalizeIntensityd", keys=["image"], normalizer=like("NormalizeIntensity", subtrahend=FIRST[0],
                                                                   divisor=FIRST[1])),
        like("ViTImageProcessor", do_normalize=True, image_mean=list(FIRST[0]), image_std=list(FIRST[1])),
        like("CLIPProcessor", image_processor=like("CLIPImageProcessor", do_normalize=True, image_mean=FIRST[0],
                                                   image_std=FIRST[1])),
        like("PrefetchLoader", loader=DataLoader(Untouchable()), **tensors(255.0)),
        like("PrefetchLoader", loader=DataLoader(Untouchable()), mean=torch.tensor(FIRST[0]).view(1, 3, 1, 1) * 255,
             std=torch.tensor(FIRST[1]).view(1, 3, 1, 1) * 255),
        like("MyNormalization", mean=np.array(FIRST[0]), std=np.array(FIRST[1])),
    ],
    ids=lambda step: type(step).__name__,
)  # fmt: skip
def test_normalizations_of_all_libraries_are_known(step):
    [(mean, std)] = found(DataLoader(Untouchable(step)) if type(step).__name__ != "PrefetchLoader" else step)
    assert mean == pytest.approx(FIRST[0], abs=1e-6)
    assert std == pytest.approx(FIRST[1], abs=1e-6)


def test_a_normalization_says_where_it_was_found():
    sources = [each.source for each in pipeline_normalizations([normalize(), like("Normalizer", mean=0.1, std=0.2)])]
    assert sources == ["Normalizer", "Normalize"]
    assert [each.source for each in pipeline_normalizations(like("PrefetchLoader", **tensors(255.0)))] == [
        "PrefetchLoader"
    ]


@pytest.mark.parametrize(
    "step",
    [
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.LayerNorm(3),
        nn.GroupNorm(1, 3),
        nn.LocalResponseNorm(3),
        *(
            like("Normalize", **ALBUMENTATIONS, normalization=kind)
            for kind in ("image", "image_per_channel", "min_max", "min_max_per_channel")
        ),
        like("ViTImageProcessor", do_normalize=False, image_mean=FIRST[0], image_std=FIRST[1]),
        like("ViTImageProcessor", do_normalize=None, image_mean=FIRST[0], image_std=FIRST[1]),
        like("NormalizeIntensity", subtrahend=None, divisor=None),
        like("Normalize"),
        like("Normalize", mean=None, std=None),
        like("Normalize", mean="imagenet", std="imagenet"),
        like("Normalize", mean=explode, std=explode),
        like("Normalize", mean=(), std=()),
        like("Normalize", mean=(0.1, 0.2), std=(0.1, 0.2, 0.3)),
        like("Normalize", mean=(0.5,), std=(0.0,)),
        like("Normalize", mean=(0.5,), std=(-1.0,)),
        like("Normalize", mean=(float("nan"),), std=(1.0,)),
        like("Normalize", mean=(0.5,), std=(float("nan"),)),
        like("Normalize", mean=(0.5,), std=(float("inf"),)),
        like("Normalize", flags={"p": 1.0}),
        like("GaussianNoise", mean=0.0, std=0.1),
        like("PrefetchLoader", loader=None),
        like("Statistics", mean=FIRST[0], std=FIRST[1]),
        FIRST,
        np.array(FIRST),
        {"mean": FIRST[0], "std": FIRST[1]},
    ],
    ids=lambda step: type(step).__name__,
)
def test_what_is_no_normalization_of_pixels_is_not_taken(step):
    assert found(DataLoader(Untouchable(step))) == []


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "together",
    [
        lambda *steps: v1.Compose(list(steps)),
        lambda *steps: v2.Compose(list(steps)),
        lambda *steps: list(steps),
        lambda *steps: v1.Compose([v1.Compose([steps[0]]), v1.Compose(list(steps[1:]))]),
        lambda *steps: nn.Sequential(*steps),
    ],
    ids=["v1.Compose", "v2.Compose", "list", "nested", "nn.Sequential"],
)
def test_the_last_of_a_sequence_comes_first(together):
    steps = [normalize(constants) for constants in (THIRD, FIRST, SECOND)]
    assert found(DataLoader(Untouchable(together(*steps)))) == [SECOND, FIRST, THIRD]


@pytest.mark.parametrize("inner", ["dataset", "base", "data", "subset"])
@pytest.mark.parametrize("step", ["transform", "tf", "aug", "transforms", "_eval_transform"])
def test_what_a_wrapper_does_comes_before_what_it_wraps(inner, step):
    data = Wrapper(Untouchable(normalize(FIRST)), normalize(SECOND), (inner, step))
    assert found(data) == [SECOND, FIRST]
    assert found(DataLoader(data)) == [SECOND, FIRST]
    assert found(Wrapper(Subset(data, [1]), normalize(THIRD), (inner, step))) == [THIRD, SECOND, FIRST]
    assert found(DataLoader(Subset(data, [1]))) == [SECOND, FIRST]


def test_what_a_loader_does_comes_before_what_its_data_set_does():
    """A collate function gets samples that the data set has already transformed."""
    collate = functools.partial(lambda how, batch: explode(), normalize(SECOND))
    assert found(DataLoader(Untouchable(normalize(FIRST)), collate_fn=collate)) == [SECOND, FIRST]


def test_what_a_prefetching_loader_does_comes_first():
    loader = DataLoader(Untouchable(normalize(SECOND)))
    (mean, _), inner = found(like("PrefetchLoader", loader=loader, **tensors(255.0)))
    assert mean == pytest.approx(FIRST[0], abs=1e-6)
    assert inner == SECOND


def test_the_same_object_counts_once():
    step = normalize()
    assert found([Untouchable(step), Untouchable(v1.Compose([step]))]) == [FIRST]


# --- models -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, **held):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.LayerNorm(6))
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)


def buffers(constants, prefix=""):
    return {
        f"{prefix}{name}": torch.tensor(values).view(-1, 1, 1)
        for name, values in zip(("mean", "std"), constants, strict=True)
    }


def of_model(model):
    normalization = model_normalization(model)
    return None if normalization is None else (normalization.mean, normalization.std)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, None),
        (Net(), None),
        (Net(input_normalization=normalize()), FIRST),
        (Net(input_normalization=v2.Normalize(*FIRST)), FIRST),
        (Net(input_normalization=SimpleNamespace(mean=FIRST[0], std=FIRST[1])), FIRST),
        (Net(input_normalization=module_like("Scale", **tensors())), FIRST),
        (Net(input_normalization=normalize(), other=normalize(SECOND)), FIRST),
        (Net(input_normalization=normalize(), **buffers(SECOND)), FIRST),
        (Net(norm=normalize()), FIRST),
        (nn.Sequential(normalize(), nn.Conv2d(3, 4, 3)), FIRST),
        (nn.Sequential(nn.Sequential(nn.Identity(), v2.Normalize(*FIRST)), nn.Flatten()), FIRST),
        (nn.Sequential(normalize(THIRD), nn.Flatten()), THIRD),
        (nn.Sequential(module_like("NormalizeLayer", **tensors()), nn.Flatten()), FIRST),
        (Net(norm=module_like("Normalize", **buffers(FIRST)), other=nn.Identity()), FIRST),
        (Net(**buffers(FIRST)), FIRST),
        (Net(**buffers(FIRST, "pixel_")), FIRST),
        (Net(**buffers(FIRST, "image_")), FIRST),
        (Net(**buffers(FIRST, "input_")), FIRST),
        (Net(mean=FIRST[0], std=FIRST[1]), FIRST),
        (Net(mean=list(FIRST[0]), std=list(FIRST[1])), FIRST),
        (nn.Sequential(Net(**buffers(FIRST))), FIRST),
        (nn.Sequential(normalize(), nn.Sequential(normalize())), FIRST),
        (Net(**buffers(FIRST), **buffers(FIRST, "pixel_")), FIRST),
        (Net(norm=normalize(), **buffers(SECOND)), FIRST),
        (nn.Sequential(normalize(), normalize(SECOND)), None),
        (Net(one=normalize(), two=normalize(SECOND)), None),
        (Net(**buffers(FIRST), **buffers(SECOND, "pixel_")), None),
        (nn.Sequential(Net(**buffers(FIRST)), Net(**buffers(SECOND))), None),
        (Net(mean=torch.zeros(3), std=torch.zeros(3)), None),
        (Net(mean=torch.zeros(3)), None),
        (Net(mean="a", std="b"), None),
        *(
            (Net(input_normalization=value), None)
            for value in (True, False, None, "imagenet", FIRST, nn.BatchNorm2d(3), nn.LayerNorm(3), explode, 0.5)
        ),
        (Net(input_normalization=True, norm=normalize()), FIRST),
        (Net(input_normalization="imagenet", **buffers(FIRST)), FIRST),
        (Net(input_normalization=nn.BatchNorm2d(3), **buffers(FIRST)), FIRST),
    ],
)
def test_the_one_normalization_of_a_model_is_found(model, expected):
    got = of_model(model)
    if expected is None:
        assert got is None
    else:
        assert got[0] == pytest.approx(expected[0], abs=1e-7)
        assert got[1] == pytest.approx(expected[1], abs=1e-7)


def test_noise_inside_a_model_is_no_normalization_of_its_inputs():
    class GaussianNoise(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.std = 0.0, 0.1

    assert of_model(Net(noise=GaussianNoise())) is None
    assert of_model(Net(noise=GaussianNoise(), **buffers(FIRST))) is not None


def test_a_model_is_not_called_or_changed():
    class Strict(Net):
        forward = __call__ = explode

    model = Strict(norm=V1(*FIRST), **buffers(SECOND)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert of_model(model) == FIRST
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
