"""Samples are identified by content and position, so that each counts once in any order and sharding."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_normgeo.robustness import InputSpace, evaluate_robustness
from lightning_normgeo.robustness.results.samples.sample_identity import (
    KEYS,
    SampleOrder,
    SeenSamples,
    copy_key,
    merged_places,
    order_of,
    sample_keys,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
PIXELS = InputSpace(None, None, normalized_data=False)
SEEDS = st.integers(0, 10**6)


# --- keys -------------------------------------------------------------------------------------------------------------


def raw_images(seed=0, count=6, shape=(3, 5, 4)):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed))


def sharp(raw):
    return raw.float() / 255


def classes(seed=0, count=6):
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(seed + 1))


def shaped(values):
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def floats(seed=0, count=6, dtype=torch.float32):
    return torch.rand(count, 3, 5, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@PROPERTY
@given(SEEDS, st.permutations(range(6)), st.integers(0, 6), st.booleans())
def test_a_key_belongs_to_a_sample_whatever_its_batch(seed, order, cut, eight_bits):
    images, labels = sharp(raw_images(seed)) if eight_bits else floats(seed), classes(seed)
    keys = sample_keys(images, labels, PIXELS)
    moved = torch.tensor(order)
    assert sample_keys(images[moved], labels[moved], PIXELS) == [keys[k] for k in order]
    parts = [sample_keys(images[part], labels[part], PIXELS) for part in (slice(cut), slice(cut, None))]
    assert parts[0] + parts[1] == keys
    assert all(type(key) is int and 0 <= key < KEYS == 2**63 for key in keys)
    assert len(set(keys)) == 6


@PROPERTY
@given(SEEDS, st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_key_does_not_depend_on_whether_others_are_bytes(seed, which):
    images, labels = (
        torch.where(torch.tensor(which).view(-1, 1, 1, 1), sharp(raw_images(seed)), floats(seed)),
        classes(),
    )
    together = sample_keys(images, labels, PIXELS)
    assert together == [sample_keys(images[k : k + 1], labels[k : k + 1], PIXELS)[0] for k in range(6)]


@PROPERTY
@given(
    SEEDS,
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 1.5)), min_size=3, max_size=3)
    | st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 1.5)), min_size=1, max_size=1),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_key_is_that_of_the_bytes_whatever_normalizes_them(seed, constants, dtype):
    mean, std = (tuple(part) for part in zip(*constants, strict=True))
    raw, labels = raw_images(seed), classes(seed)
    images = ((sharp(raw) - shaped(mean)) / shaped(std)).to(dtype)
    expected = sample_keys(sharp(raw), labels, PIXELS)
    assert sample_keys(images, labels, InputSpace(mean, std, normalized_data=True)) == expected
    assert sample_keys(sharp(raw).to(dtype), labels, InputSpace(mean, std, normalized_data=False)) == expected
    assert sample_keys(raw.to(dtype), labels, InputSpace((0.0,), (1 / 255,), normalized_data=True)) == expected


@PROPERTY
@given(SEEDS, st.integers(0, 5), st.integers(0, 59), st.sampled_from([-1, 1]))
def test_one_level_of_one_pixel_makes_another_sample(seed, sample, pixel, by):
    raw, labels = raw_images(seed), classes(seed)
    changed = raw.clone()
    value = changed[sample].view(-1)
    value[pixel] += by if 0 <= value[pixel] + by <= 255 else -by
    before, after = (sample_keys(sharp(part), labels, PIXELS) for part in (raw, changed))
    assert [k for k in range(6) if before[k] != after[k]] == [sample]


@PROPERTY
@given(SEEDS, st.integers(0, 5), st.integers(1, 10**6), st.booleans())
def test_another_label_makes_another_sample(seed, sample, by, eight_bits):
    images, labels = sharp(raw_images(seed)) if eight_bits else floats(seed), classes(seed)
    changed = labels.clone()
    changed[sample] += by
    before, after = (sample_keys(images, part, PIXELS) for part in (labels, changed))
    assert [k for k in range(6) if before[k] != after[k]] == [sample]


@PROPERTY
@given(SEEDS, st.integers(0, 5), st.integers(0, 59), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_of_other_images_the_last_bit_decides(seed, sample, pixel, dtype):
    images, labels = floats(seed).to(dtype), classes(seed)
    changed = images.clone()
    value = changed[sample].view(-1)
    value[pixel] = torch.nextafter(value[pixel], torch.tensor(2.0, dtype=dtype))
    before, after = (sample_keys(part, labels, PIXELS) for part in (images, changed))
    assert [k for k in range(6) if before[k] != after[k]] == [sample]
    assert sample_keys(images.clone(), labels, PIXELS) == before


def test_inputs_that_are_no_pixels_have_keys_too():
    images, labels = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 40, torch.arange(5)
    for inputs in (InputSpace(None, None, normalized_data=True), PIXELS, InputSpace((0.0,), (9.0,), True)):
        keys = sample_keys(images, labels, inputs)
        assert len(set(keys)) == 5
        assert sample_keys(images.flip(0), labels.flip(0), inputs) == keys[::-1]


def test_the_shape_of_an_image_is_part_of_it():
    images, labels = sharp(raw_images(shape=(1, 4, 6))), classes()
    shapes = [(6, 1, 4, 6), (6, 1, 6, 4), (6, 4, 6, 1), (6, 1, 24), (6, 24)]
    keys = [sample_keys(images.reshape(shape), labels, PIXELS)[0] for shape in shapes]
    assert len(set(keys)) == len(shapes)


def test_the_memory_of_an_image_is_no_part_of_it():
    for images in (sharp(raw_images()), floats()):
        keys = sample_keys(images, classes(), PIXELS)
        assert sample_keys(images.contiguous(memory_format=torch.channels_last), classes(), PIXELS) == keys
        assert sample_keys(images.movedim(1, -1).contiguous().movedim(-1, 1), classes(), PIXELS) == keys
        assert sample_keys(torch.stack([images, images], 1)[:, 1], classes(), PIXELS) == keys
        assert sample_keys(images.clone().requires_grad_(), classes(), PIXELS) == keys


def test_no_two_of_many_samples_have_a_key_in_common():
    raw = torch.zeros(4000, 1, 4, 4, dtype=torch.long)
    raw.view(4000, 16)[:, :2] = torch.stack([torch.arange(4000) // 64, torch.arange(4000) % 64], 1)
    keys = sample_keys(sharp(raw), torch.zeros(4000, dtype=torch.long), PIXELS)
    assert len(set(keys)) == 4000
    assert 0.48 < sum(key < KEYS // 2 for key in keys) / 4000 < 0.52


def test_copies_stay_apart():
    draw = random.Random(0)
    keys = [0, 1, KEYS - 1, *(draw.randrange(KEYS) for _ in range(50))]
    copies = [copy_key(key, copy) for key in keys for copy in range(200)]
    assert len(set(copies)) == len(copies)
    assert all(0 <= key < KEYS for key in copies)
    assert all(copy_key(key, 0) == key for key in keys)


# --- the order of a loader --------------------------------------------------------------------------------------------


class Numbers(Dataset):
    """A data set whose samples are their indices."""

    def __init__(self, count=20):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return int(index)


class NoLength(Dataset):
    def __getitem__(self, index):
        return int(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(20))


class StreamWithLength(Stream):
    def __len__(self):
        return 20


class Twice(Sampler):
    def __iter__(self):
        return iter([*range(20), *range(20)])

    def __len__(self):
        return 40


class Backwards(SequentialSampler):
    def __iter__(self):
        return iter(reversed(range(20)))


class OddBatches(BatchSampler):
    def __iter__(self):
        return iter([[3, 3, 4], [5]])


DATA = Numbers()
WEIGHTS = torch.arange(20.0)


def sharded(rank, world=3, shuffle=False, drop_last=False, epoch=0):
    sampler = DistributedSampler(DATA, world, rank, shuffle=shuffle, drop_last=drop_last)
    sampler.set_epoch(epoch)
    return sampler


# loader, whether its positions are known, whether it may repeat samples
LOADERS = {
    "in order": (DataLoader(DATA, batch_size=6), True, False),
    "in order, incomplete": (DataLoader(DATA, batch_size=6, drop_last=True), True, False),
    "shuffled": (DataLoader(DATA, batch_size=6, shuffle=True), False, False),
    "concatenated": (DataLoader(ConcatDataset([DATA, DATA]), batch_size=6), True, False),
    "subset": (DataLoader(Subset(DATA, [4, 4, 1]), batch_size=2), None, None),
    "sampler in order": (DataLoader(DATA, sampler=SequentialSampler(DATA)), True, False),
    "sampler in order, of some": (DataLoader(DATA, sampler=SequentialSampler(range(7))), True, False),
    "without replacement": (DataLoader(DATA, sampler=RandomSampler(DATA)), False, False),
    "some without replacement": (DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=7)), False, False),
    "more than there are": (DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=33)), False, True),
    "with replacement": (DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), False, True),
    "weighted": (DataLoader(DATA, sampler=WeightedRandomSampler(WEIGHTS, 30)), False, True),
    "some at random": (DataLoader(DATA, sampler=SubsetRandomSampler([5, 3, 9])), False, False),
    "some at random, twice": (DataLoader(DATA, sampler=SubsetRandomSampler([5, 3, 5])), False, True),
    "sampler of one's own": (DataLoader(DATA, sampler=Twice()), False, True),
    "sampler of one's own kind": (DataLoader(DATA, sampler=Backwards(DATA)), False, True),
    "list as a sampler": (DataLoader(DATA, sampler=[3, 3, 1]), False, True),
    "batches of one's own": (DataLoader(DATA, batch_sampler=[[0, 1], [1, 2]]), False, True),
    "batches of one's own kind": (DataLoader(DATA, batch_sampler=OddBatches(range(20), 3, False)), False, True),
    "batches in order": (DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 3, True)), None, None),
    "batches shuffled": (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, False)), None, None),
    "batches with replacement": (
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA, replacement=True), 3, False)), None, True,
    ),
    "batches weighted": (
        DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler(WEIGHTS, 30), 3, False)), None, True,
    ),
    "batches of a list": (DataLoader(DATA, batch_sampler=BatchSampler([7, 7, 2], 2, False)), None, True),
    "batches of a share": (DataLoader(DATA, batch_sampler=BatchSampler(sharded(1), 3, False)), None, None),
    "stream": (DataLoader(Stream(), batch_size=6), False, False),
    "stream with a length": (DataLoader(StreamWithLength(), batch_size=6), False, False),
    "chained streams": (DataLoader(ChainDataset([Stream()]), batch_size=6), False, False),
    "no length": (DataLoader(NoLength(), sampler=range(9), batch_size=2), False, None),
    "no length, repeated": (DataLoader(NoLength(), sampler=[1, 1, 2], batch_size=2), False, True),
    **{
        f"share {rank}, {shuffle=}, {drop_last=}, {epoch=}": (
            DataLoader(DATA, sampler=sharded(rank, 3, shuffle, drop_last, epoch), batch_size=2), True, None,
        )
        for rank in range(3)
        for shuffle in (False, True)
        for drop_last in (False, True)
        for epoch in ((0, 5) if shuffle else (0,))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_the_order_of_a_loader_is_known_as_far_as_it_is(name):
    """Known positions are those drawn, and a loader that does not repeat samples draws none twice."""
    loader, known, repeats = LOADERS[name]
    order = order_of(loader)
    for _ in range(3):
        drawn = [number for batch in loader for number in batch.tolist()]
        if order.positions is not None and name not in ("subset", "concatenated"):
            assert list(order.positions)[: len(drawn)] == drawn
        if order.positions is None and not order.repeats:
            assert len(set(drawn)) == len(drawn)
    if known is not None:
        assert (order.positions is not None) == known
    if repeats is not None:
        assert order.repeats == repeats
    if order.positions is not None:
        assert len(order.positions) >= len(drawn)


@pytest.mark.parametrize(
    "loader", [[(1, 2)], iter([]), None, {"a": DataLoader(DATA)}, DATA], ids=lambda x: type(x).__name__
)
def test_what_is_no_loader_has_no_order_but_its_own(loader):
    assert order_of(loader) == SampleOrder(None, False)


def test_a_data_set_of_whole_batches_has_no_known_positions():
    """The items of such a data set are batches, not samples."""
    batches = [(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.long))] * 5
    assert order_of(DataLoader(batches, batch_size=None)).positions is None


@pytest.mark.parametrize("name", LOADERS)
def test_asking_for_the_order_draws_no_random_number(name):
    loader = LOADERS[name][0]
    before = torch.get_rng_state(), random.getstate()
    first, second = order_of(loader), order_of(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert first.repeats == second.repeats
    assert (first.positions is None) == (second.positions is None)


def test_a_generator_of_the_loader_is_left_alone():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(DATA, shuffle=True, generator=generator)
    before = generator.get_state()
    order_of(loader)
    assert torch.equal(generator.get_state(), before)


# --- one process ------------------------------------------------------------------------------------------------------

CONTENTS = st.lists(st.integers(0, 6), min_size=1, max_size=24)
LIMITS = st.none() | st.integers(1, 30)


def chunks(values, seed):
    """Yield the same values in batches of random sizes."""
    draw, start = random.Random(seed), 0
    while start < len(values):
        size = draw.randint(1, 5)
        yield values[start : start + size]
        start += size


def run_through(order, limit, keys, seed=0):
    """Return the samples seen and those to evaluate; a process stops at its limit."""
    seen, new = SeenSamples(order, limit), []
    for part in chunks(keys, seed):
        new += seen.new(part)
    assert len(new) == len(keys)
    return seen, new


@PROPERTY
@given(CONTENTS, LIMITS, SEEDS, st.booleans())
def test_samples_with_known_positions_count_once_each(contents, limit, seed, repeated):
    """A data set in any known order, partly repeated, as by padding and samplers."""
    draw = random.Random(seed)
    positions = draw.sample(range(len(contents)), len(contents))
    if repeated:
        positions += draw.choices(positions, k=5)
    seen, new = run_through(SampleOrder(positions), limit, [contents[place] for place in positions], seed)
    within = [place for place in positions if limit is None or place < limit]
    assert {key: sorted(places) for key, places in seen.places.items()} == {
        content: sorted(place for place in set(within) if contents[place] == content)
        for content in {contents[place] for place in within}
    }
    first = {}
    for arrival, place in enumerate(positions):
        if limit is None or place < limit:
            first.setdefault(contents[place], arrival)
    assert [arrival for arrival, is_new in enumerate(new) if is_new] == sorted(first.values())


@PROPERTY
@given(CONTENTS, LIMITS, SEEDS)
def test_samples_of_a_loader_that_does_not_repeat_itself_count_as_they_come(contents, limit, seed):
    seen, new = run_through(SampleOrder(), limit, contents, seed)
    counted = contents[:limit]
    assert {key: len(places) for key, places in seen.places.items()} == Counter(counted)
    assert sorted(place for places in seen.places.values() for place in places) == list(range(len(counted)))
    assert [k for k, is_new in enumerate(new) if is_new] == sorted(counted.index(key) for key in set(counted))
    assert seen.full == (limit is not None and len(counted) == limit)


@PROPERTY
@given(CONTENTS, LIMITS, SEEDS)
def test_samples_of_a_loader_that_may_repeat_itself_count_once_for_a_content(contents, limit, seed):
    seen, new = run_through(SampleOrder(repeats=True), limit, contents, seed)
    different = list(dict.fromkeys(contents))[:limit]
    assert {key: len(places) for key, places in seen.places.items()} == dict.fromkeys(different, 1)
    assert [k for k, is_new in enumerate(new) if is_new] == [contents.index(key) for key in different]
    assert seen.full == (limit is not None and len(different) == limit)


@PROPERTY
@given(CONTENTS, LIMITS, SEEDS, st.sampled_from(["in order", "shuffled", "unknown", "repeats"]))
def test_nothing_counts_any_more_once_it_is_full(contents, limit, seed, kind):
    positions = list(range(len(contents)))
    if kind == "shuffled":
        random.Random(seed).shuffle(positions)
    order = SampleOrder(positions if kind in ("in order", "shuffled") else None, kind == "repeats")
    seen, was_full = SeenSamples(order, limit), False
    for place in positions:
        before = {key: list(places) for key, places in seen.places.items()}
        [is_new] = seen.new([contents[place]])
        if was_full:
            assert not is_new
            assert seen.places == before
        assert seen.full >= was_full
        was_full = seen.full
    assert limit is not None or not was_full


@pytest.mark.parametrize(
    "order", [SampleOrder(range(100)), SampleOrder(list(range(100))), SampleOrder()], ids=["range", "list", "unknown"]
)
def test_a_loader_in_order_need_not_be_read_beyond_the_limit(order):
    seen = SeenSamples(order, limit=10)
    seen.new(range(9))
    assert not seen.full
    seen.new([9])
    assert seen.full


def test_batches_of_any_size_count_the_same():
    contents = [k * k % 7 for k in range(40)]
    for order in (SampleOrder(range(40)), SampleOrder(), SampleOrder(repeats=True)):
        results = [run_through(order, 23, contents, seed) for seed in range(5)]
        assert all(new == results[0][1] and seen.places == results[0][0].places for seen, new in results)


def test_a_sample_counts_once():
    seen = SeenSamples(SampleOrder([4, 1, 4, 1]))
    assert seen.new([7, 7, 7, 7]) == [True, False, False, False]
    assert seen.places == {7: [4, 1]}


@pytest.mark.parametrize("name", [name for name, (loader, _, _) in LOADERS.items() if order_of(loader).positions])
def test_a_loader_that_begins_again_shows_nothing_new(name):
    """For example a cycled loader beside a longer one."""
    loader = LOADERS[name][0]
    once = [number for batch in loader for number in batch.tolist()]
    for limit in (None, 4):
        seen = SeenSamples(order_of(loader), limit)
        seen.new(once)
        before = {key: list(places) for key, places in seen.places.items()}
        assert not any(seen.new(once))
        assert seen.places == before


# --- several processes ------------------------------------------------------------------------------------------------


class Contents(Dataset):
    """A data set in which several samples may be equal."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        return self.contents[index]


def counted(merged):
    return {key: len(places) for key, places in merged.items()}


def well_formed(merged):
    """Check that positions and the keys of copies are distinct, and that the first copy's key is the key itself."""
    flat = [entry for entries in merged.values() for entry in entries]
    assert len({place for place, _ in flat}) == len(flat)
    assert len({copy for _, copy in flat}) == len(flat)
    assert all(entry[1] == copy_key(key, n) for key, entries in merged.items() for n, entry in enumerate(entries))
    assert all(entries and entries == sorted(entries, key=lambda entry: entry[0]) for entries in merged.values())
    return True


@PROPERTY
@given(CONTENTS, LIMITS, st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 9))
def test_shares_of_a_data_set_are_the_data_set(contents, limit, world, shuffle, drop_last, epoch):
    """Sharded as by DistributedSampler: padded, or without the remainder."""
    data, parts, everywhere = Contents(contents), [], set()
    for rank in range(world):
        sampler = DistributedSampler(data, world, rank, shuffle=shuffle, drop_last=drop_last)
        sampler.set_epoch(epoch)
        loader = DataLoader(data, batch_size=3, sampler=sampler)
        seen = SeenSamples(order_of(loader), limit)
        for batch in loader:
            seen.new(batch.tolist())
        everywhere |= set(sampler)
        parts.append(seen.places)
    merged = merged_places(parts, positions_known=True, limit=limit)
    within = sorted(place for place in everywhere if limit is None or place < limit)
    assert well_formed(merged)
    assert {place: key for key, entries in merged.items() for place, _ in entries} == {
        place: contents[place] for place in within
    }
    assert merged_places(parts[::-1], positions_known=True, limit=limit) == merged
    if not drop_last:
        assert within == list(range(len(contents)))[:limit]


@PROPERTY
@given(CONTENTS, LIMITS, st.integers(1, 4), SEEDS)
def test_processes_that_see_everything_in_order_see_it_once(contents, limit, world, seed):
    parts = [
        run_through(SampleOrder(range(len(contents))), limit, contents, seed + rank)[0].places for rank in range(world)
    ]
    merged = merged_places(parts, positions_known=True, limit=limit)
    assert well_formed(merged)
    assert {place: key for key, entries in merged.items() for place, _ in entries} == dict(enumerate(contents[:limit]))


@PROPERTY
@given(CONTENTS, st.integers(1, 4), SEEDS)
def test_processes_that_see_everything_in_orders_of_their_own_see_it_once(contents, world, seed):
    draw = random.Random(seed)
    parts = [
        run_through(SampleOrder(), None, draw.sample(contents, len(contents)), seed)[0].places for _ in range(world)
    ]
    merged = merged_places(parts, positions_known=False)
    assert well_formed(merged)
    assert counted(merged) == Counter(contents)
    assert sorted(place for entries in merged.values() for place, _ in entries) == list(range(len(contents)))


@PROPERTY
@given(st.lists(CONTENTS, min_size=1, max_size=4), LIMITS, st.booleans(), SEEDS)
def test_of_unknown_shares_a_key_counts_as_often_as_where_it_is_most_often(shares, limit, repeats, seed):
    """Shards and overlaps: no sample counts twice because two processes have it."""
    parts = [run_through(SampleOrder(repeats=repeats), limit, share, seed)[0].places for share in shares]
    merged = merged_places(parts, positions_known=False, limit=limit)
    kept = [list(dict.fromkeys(share))[:limit] if repeats else share[:limit] for share in shares]
    most = Counter()
    for share in kept:
        most |= Counter(share)
    assert well_formed(merged)
    got = counted(merged)
    if limit is None:
        assert got == most
    else:
        assert sum(got.values()) == min(limit, sum(most.values()))
        assert all(count <= most[key] for key, count in got.items())
    assert sorted(place for entries in merged.values() for place, _ in entries) == list(range(sum(got.values())))


@PROPERTY
@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=30), st.integers(1, 4), SEEDS)
def test_shards_of_different_samples_are_all_of_them(keys, world, seed):
    draw = random.Random(seed)
    order = draw.sample(sorted(keys), len(keys))
    parts = [run_through(SampleOrder(), None, order[rank::world], seed)[0].places for rank in range(world)]
    assert counted(merged_places(parts, positions_known=False)) == dict.fromkeys(keys, 1)


@PROPERTY
@given(CONTENTS, SEEDS, st.integers(1, 3))
def test_shares_that_overlap_count_positions_once(contents, seed, world):
    draw = random.Random(seed)
    orders = [draw.choices(range(len(contents)), k=draw.randint(1, 30)) for _ in range(world)]
    parts = [run_through(SampleOrder(order), None, [contents[p] for p in order], seed)[0].places for order in orders]
    merged = merged_places(parts, positions_known=True)
    assert well_formed(merged)
    assert {place: key for key, entries in merged.items() for place, _ in entries} == {
        place: contents[place] for order in orders for place in order
    }


@pytest.mark.parametrize("known", [True, False])
def test_processes_without_samples_change_nothing(known):
    assert merged_places([], known) == {}
    assert merged_places([{}, {}], known) == {}
    assert merged_places([{}, {5: [2]}, {}], known) == {5: [(2 if known else 0, 5)]}


# --- whole evaluations ------------------------------------------------------------------------------------------------


class Bright(torch.nn.Module):
    """Classifier: class 1 if the image is brighter than 0.5."""

    def forward(self, x):
        return torch.stack([torch.zeros_like(x[:, 0, 0, 0]), x.flatten(1).mean(1) - 0.5], 1)


CONTENT = [0, 1, 2, 0, 3, 4, 4, 4, 5, 1, 6, 7, 0, 8, 9, 9]
IMAGES = sharp(raw_images(3, 10, (1, 4, 4)))[CONTENT]
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0, 0])[CONTENT]
WHOLE = TensorDataset(IMAGES, LABELS)


def evaluated(loader, **settings):
    return evaluate_robustness(Bright(), loader, attacks=[], progress=False, **settings)


def right(numbers):
    return sum(int(int(IMAGES[k].mean() > 0.5) == int(LABELS[k])) for k in numbers)


@pytest.mark.parametrize("limit", [None, 1, 5, 16, 40])
@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(WHOLE, batch_size=3),
        DataLoader(WHOLE, batch_size=16),
        DataLoader(WHOLE, batch_size=5, sampler=SequentialSampler(WHOLE)),
        DataLoader(WHOLE, batch_size=3, sampler=DistributedSampler(WHOLE, 1, 0, shuffle=True)),
        [(IMAGES[k : k + 4], LABELS[k : k + 4]) for k in range(0, 16, 4)],
    ],
    ids=["three at a time", "all at once", "a sampler", "the only share", "a list"],
)
def test_an_evaluation_counts_every_sample_of_a_data_set(loader, limit):
    report = evaluated(loader, max_samples=limit)
    clean = report.results["clean"]
    assert (clean.correct, clean.n) == (right(range(16)[:limit]), min(16, limit or 16))
    assert report.decisions.of("clean").index.tolist() == list(range(16))[:limit]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(WHOLE, batch_size=3, shuffle=True),
        DataLoader(WHOLE, batch_size=3, sampler=SubsetRandomSampler(range(16))),
        DataLoader(WHOLE, batch_sampler=BatchSampler(RandomSampler(WHOLE), 3, False)),
    ],
    ids=["shuffled", "some at random", "batches shuffled"],
)
def test_an_evaluation_counts_every_sample_of_a_shuffled_data_set(loader):
    clean = evaluated(loader).results["clean"]
    assert (clean.correct, clean.n) == (right(range(16)), 16)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(WHOLE, batch_size=3, sampler=[*range(16), *range(16), 3]),
        DataLoader(WHOLE, batch_sampler=[[0, 1, 2, 3], [*range(16)], [5, 6]]),
        DataLoader(WHOLE, batch_sampler=BatchSampler([*range(16), *range(16)], 5, False)),
    ],
    ids=["list", "batches of one's own", "batches of a list"],
)
def test_an_evaluation_counts_a_content_once_where_a_loader_may_repeat_itself(loader):
    clean = evaluated(loader).results["clean"]
    different = {(CONTENT[k], int(LABELS[k])): k for k in range(16)}
    assert (clean.correct, clean.n) == (right(different.values()), len(different))
