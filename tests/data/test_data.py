"""Data modules: splits, pixels, augmentation, and errors of data folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_lightning import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_normgeo import CIFARDataModule, DigitsDataModule, ImageFolderDataModule
from lightning_normgeo.data.images import (
    Batch,
    ImageDataModule,
    TrainBatch,
    random_crop,
    random_flip,
    stratified_split,
)
from lightning_normgeo.errors import ConfigurationError


def ready(data: ImageDataModule) -> ImageDataModule:
    """Return the module with its data loaded."""
    data.prepare_data()
    data.setup()
    return data


def whole(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """Return all images and labels of a loader."""
    batches = list(loader)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_sizes_and_shapes() -> None:
    data = ready(DigitsDataModule(batch_size=50))
    sizes = {name: len(images) for name, images in data._sets.items()}
    assert sum(sizes.values()) == 1797
    assert sizes == {"train": 1295, "val": 143, "test": 359}
    assert data.num_classes == 10
    for images in data._sets.values():
        assert (images.images.dtype, images.images.shape[1:]) == (torch.uint8, (3, 32, 32))
        assert torch.equal(images.images[:, 0], images.images[:, 2])
        assert images.labels.unique().tolist() == list(range(10))


def test_digits_splits_do_not_overlap() -> None:
    data = ready(DigitsDataModule())
    train, val, test = (rows(data._sets[name].images) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1295, 143, 359)  # no image is in two splits
    assert len(train | val | test) == 1797


def test_digits_test_set_is_the_same_for_every_split_seed() -> None:
    one, other = ready(DigitsDataModule(split_seed=0)), ready(DigitsDataModule(split_seed=1, val_fraction=0.5))
    assert torch.equal(one._sets["test"].images, other._sets["test"].images)
    assert rows(one._sets["val"].images) != rows(other._sets["val"].images)


def test_digits_keep_the_values_of_the_source() -> None:
    from sklearn.datasets import load_digits

    images, labels = whole(ready(DigitsDataModule()).test_dataloader())
    source = load_digits()
    small = torch.as_tensor(source.images).float()[:, None] / 16
    large = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear", align_corners=False)
    distance, nearest = torch.cdist(images[:, 0].flatten(1) / 255, large.flatten(1)).min(1)
    assert distance.max() < 32 * 0.5 / 255  # only rounding to 8 bits
    assert torch.equal(torch.as_tensor(source.target)[nearest], labels)


@pytest.mark.parametrize("loader", ["train", "val", "test", "predict"])
def test_batches_are_floats_in_0_1(loader: str) -> None:
    data = ready(DigitsDataModule(batch_size=32, crop_padding=2))
    raw = next(iter(getattr(data, f"{loader}_dataloader")()))
    batch = data.on_after_batch_transfer(raw, 0)
    assert raw.images.dtype == torch.uint8
    assert isinstance(raw, TrainBatch if loader == "train" else Batch)
    assert isinstance(batch, Batch)
    assert (batch.images.dtype, batch.images.shape) == (torch.float32, (32, 3, 32, 32))
    assert (batch.images.min(), batch.images.max()) == (0, 1)


def test_other_batches_are_left_alone() -> None:
    batch = (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2))
    assert DigitsDataModule().on_after_batch_transfer(batch, 0) is batch


def test_training_batches_are_augmented_and_others_are_not() -> None:
    data = ready(DigitsDataModule(batch_size=16, crop_padding=4))
    for name, augmented in (("train", True), ("val", False), ("test", False)):
        raw = data._sets[name].__getitems__(range(16))
        first, second = (data.on_after_batch_transfer(raw, 0).images for _ in range(2))
        assert torch.equal(first, second) is not augmented
        assert torch.equal(first, raw.images / 255) is not augmented


def test_same_seed_same_batches() -> None:
    def batches(seed: int) -> list[Tensor]:
        seed_everything(seed, verbose=False)
        data = ready(DigitsDataModule(batch_size=64, crop_padding=2))
        return [data.on_after_batch_transfer(batch, 0).images for batch in list(data.train_dataloader())[:2]]

    assert all(map(torch.equal, batches(1), batches(1)))
    assert not torch.equal(batches(1)[0], batches(2)[0])


def test_distributed_samplers_share_the_images() -> None:
    data = ready(DigitsDataModule(batch_size=100))
    images = data._sets["test"]
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(images, num_replicas=2, rank=rank, shuffle=False)
        loader = DataLoader(images, batch_size=100, sampler=sampler, collate_fn=data.test_dataloader().collate_fn)
        seen.append(rows(whole(loader)[0]))
    assert seen[0] | seen[1] == rows(images.images)
    assert len(seen[0] & seen[1]) <= 1  # one image is repeated where the number is odd


def test_last_small_training_batch_is_dropped_unless_it_is_the_only_one() -> None:
    assert len(ready(DigitsDataModule(batch_size=100)).train_dataloader()) == 12
    assert len(ready(DigitsDataModule(batch_size=5000)).train_dataloader()) == 1
    assert sum(len(batch.labels) for batch in ready(DigitsDataModule(batch_size=100)).val_dataloader()) == 143


def test_stratified_split_keeps_classes_and_random_state() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    state = torch.get_rng_state()
    first, second = stratified_split(labels, 0.2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(63))
    assert labels[second].bincount().tolist() == [10, 2, 1]
    assert torch.equal(second, stratified_split(labels, 0.2, seed=3)[1])
    assert not torch.equal(second, stratified_split(labels, 0.2, seed=4)[1])


def test_random_flip_is_the_loop_over_images() -> None:
    images = torch.rand(40, 3, 5, 7)
    torch.manual_seed(5)
    flipped = random_flip(images)
    torch.manual_seed(5)
    chosen = torch.rand(40) < 0.5
    assert 5 < chosen.sum() < 35
    for image, result, flip in zip(images, flipped, chosen, strict=True):
        assert torch.equal(result, image[..., torch.arange(6, -1, -1)] if flip else image)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_random_crop_is_the_loop_over_images(padding: int) -> None:
    images = torch.rand(30, 2, 6, 5) + 1
    torch.manual_seed(5)
    cropped = random_crop(images, padding)
    torch.manual_seed(5)
    offsets = torch.randint(2 * padding + 1, (2, 30, 1))
    places = set()
    for i, (image, result) in enumerate(zip(images, cropped, strict=True)):
        frame = torch.zeros(2, 6 + 2 * padding, 5 + 2 * padding)
        frame[:, padding : padding + 6, padding : padding + 5] = image
        top, left = offsets[0, i].item(), offsets[1, i].item()
        assert torch.equal(result, frame[:, top : top + 6, left : left + 5])
        places.add((top, left))
    assert len(places) == 1 if padding == 0 else len(places) > padding * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"DigitsDataModule: batch_size=0 must be an integer, at least 1"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 must be between 0 and 1"),
        ({"val_fraction": 0.0}, r"val_fraction=0.0 must be between 0 and 1"),
        ({"batch_size": "8"}, r"batch_size='8' must be an integer, at least 1"),
        ({"val_fraction": "0.1"}, r"val_fraction='0.1' must be between 0 and 1"),
        ({"num_workers": None}, r"num_workers=None must be an integer, at least 0"),
        ({"crop_padding": -1}, r"crop_padding=-1 must be an integer, at least 0"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DigitsDataModule(**settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two classes of images of several sizes, modes and formats."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((16 + 4 * i, 16, 3), 200 * label + i, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
            noise = generator.integers(0, 256, (20, 30), dtype=np.uint8)
            Image.fromarray(noise).save(place / "gray.JPEG")
            (place / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_folder_is_read_resized_and_labelled(folder: Path) -> None:
    data = ready(ImageFolderDataModule(str(folder), image_size=16, val_fraction=0.2))
    assert (data.num_classes, data.classes) == (2, ["cat", "dog"])
    images, labels = whole(data.test_dataloader())
    assert (images.shape, images.dtype) == ((6, 3, 16, 16), torch.uint8)
    plain = [
        (int(image.amax()), int(label)) for image, label in zip(images, labels, strict=True) if image.float().std() == 0
    ]
    assert sorted(plain) == [(0, 0), (1, 0), (200, 1), (201, 1)], "each image has the label of its folder"
    assert labels.bincount().tolist() == [3, 3]
    assert len(data._sets["train"]) + len(data._sets["val"]) == 14


def test_the_first_part_of_a_folder_stands_for_all_classes(folder: Path) -> None:
    """``limit_test_batches`` takes the first batches; sorted by class they would contain only one class."""
    _, labels = ImageFolderDataModule(str(folder), image_size=16).load("train")
    _, again = ImageFolderDataModule(str(folder), image_size=16).load("train")
    assert labels.tolist() == again.tolist() != sorted(labels.tolist())
    assert set(labels[: len(labels) // 2 + 1].tolist()) == {0, 1}


def test_folder_crops_the_center(folder: Path) -> None:
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 255
    Image.fromarray(wide).save(folder / "test" / "cat" / "0.png")
    data = ready(ImageFolderDataModule(str(folder), image_size=16))
    assert sum(bool(image.min() == 255) for image in data._sets["test"].images) == 1


def remove_train(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")


def other_class(folder: Path) -> None:
    (folder / "test" / "dog").rename(folder / "test" / "wolf")


def empty_class(folder: Path) -> None:
    (folder / "train" / "bird").mkdir()


def one_class(folder: Path) -> None:
    (folder / "train" / "dog").rename(folder / "dog")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_train, r"images/train does not exist.*data_dir/train/<class>/<image>"),
        (other_class, r"images/test differ: dog, wolf"),
        (empty_class, r"class folders without images: bird. Add images \(\.jpg.*or remove"),
        (one_class, r"train has 1 class folder\(s\); at least 2"),
    ],
)
def test_folder_that_cannot_work(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(ConfigurationError, match=message):
        ImageFolderDataModule(str(folder))


def test_folder_without_test_images(folder: Path) -> None:
    (folder / "test").rename(folder / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"test.* does not exist|test.*no images"):
        ready(ImageFolderDataModule(str(folder)))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n broken"], ids=["empty", "text", "broken"])
def test_unreadable_image_is_named(folder: Path, content: bytes) -> None:
    (folder / "train" / "dog" / "3.png").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"train/dog/3\.png cannot be read as an image.*Repair or remove"):
        ready(ImageFolderDataModule(str(folder)))


def test_truncated_image_is_named(folder: Path) -> None:
    file = folder / "train" / "dog" / "gray.JPEG"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ConfigurationError, match=r"train/dog/gray\.JPEG cannot be read.*truncated"):
        ready(ImageFolderDataModule(str(folder)))


def test_folder_larger_than_memory(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"14 images of 512×512 .*max_memory_gb=0.001\. Raise it, or"):
        ready(ImageFolderDataModule(str(folder), image_size=512, max_memory_gb=0.001))


def test_cifar_in_its_own_format(fake_cifar10: Path) -> None:
    data = ready(CIFARDataModule(data_dir=str(fake_cifar10)))
    assert {name: len(images) for name, images in data._sets.items()} == {"train": 90, "val": 10, "test": 20}
    source = torchvision.datasets.CIFAR10(str(fake_cifar10), train=False)
    images, labels = whole(data.test_dataloader())
    assert torch.equal(images, torch.from_numpy(source.data).permute(0, 3, 1, 2))
    assert labels.tolist() == source.targets


@pytest.mark.parametrize("failure", [URLError("no network"), RuntimeError("File not found or corrupted.")], ids=repr)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_network(monkeypatch: pytest.MonkeyPatch, failure: Exception, name: Any) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    match = rf"{name} is not complete in data_dir='none'.*ImageFolderDataModule.*DigitsDataModule"
    with pytest.raises(ConfigurationError, match=match):
        CIFARDataModule(name, data_dir="none").prepare_data()
    assert not Path("none").exists()


def test_cifar_without_download_and_without_data() -> None:
    with pytest.raises(ConfigurationError, match=r"cifar10 is not complete in data_dir='none'.*\(Dataset not found"):
        CIFARDataModule(data_dir="none", download=False).prepare_data()


def test_cifar_of_an_unknown_name() -> None:
    with pytest.raises(ConfigurationError, match=r"name='cifar11'\) is unknown; choose 'cifar10' or 'cifar100'"):
        CIFARDataModule("cifar11")  # type: ignore[arg-type]
