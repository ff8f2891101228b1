"""Per-sample results: stored, merged, written and read back; other files are refused."""

import math
import zipfile

import numpy as np
import pytest
import torch

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import SampleResults, load_decisions
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows, rows_of


def rows(indices, seed=0):
    """Return rows whose values depend on the index only."""
    index = torch.as_tensor(indices, dtype=torch.long)
    value = torch.rand(1000, 6, generator=torch.Generator().manual_seed(seed))[index]
    label, prediction = ((3 * value[:, k]).long() for k in (0, 1))
    return SampleRows(index, label, prediction, *value[:, 2:].unbind(1), index)


def decisions(parts, attacks=("clean", "bim")):
    found = SampleResults(attacks)
    for seed, attack in enumerate(attacks):
        for part in parts:
            label = rows(part).label
            found.add(attack, rows(part, seed)._replace(label=label))
    return found


def same(first, second):
    assert first.attacks == second.attacks
    for attack in first.attacks:
        for one, other in zip(first.of(attack), second.of(attack), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    return True


def test_rows_come_sorted_and_once_whatever_the_order():
    whole = decisions([range(20)])
    assert same(decisions([[19, 3, 4], range(15, 19), range(3), range(5, 15)]), whole)
    assert same(decisions([range(12), range(8, 20)]), whole), "of two processes that were padded"
    assert whole.of("bim").index.tolist() == list(range(20))
    assert torch.equal(whole.of("bim").correct, rows(range(20), 1).prediction == rows(range(20)).label)


def test_a_sample_that_is_there_twice_is_what_it_was_first():
    found = SampleResults(["clean"])
    found.add("clean", rows([3, 1]))
    found.add("clean", rows([1, 2], seed=5))
    assert torch.equal(found.of("clean").loss, torch.cat([rows([1]).loss, rows([2], 5).loss, rows([3]).loss]))
    assert found.seen["clean"] == (int(rows([3, 1]).correct.sum() + rows([1, 2], 5).correct.sum()), 4)


def test_parts_of_several_processes_are_put_together():
    whole, parts = decisions([range(9)]), [decisions([range(0, 9, 2)]), decisions([[]]), decisions([[1, 3, 5, 7, 0]])]
    merged = SampleResults.from_parts([{name: part.of(name) for name in part.attacks} for part in parts])
    assert same(merged, whole)


def test_nothing_is_nothing():
    empty = SampleResults(["clean"]).of("clean")
    assert all(len(values) == 0 for values in empty)
    assert len(empty.correct) == 0


def test_renamed_decisions_are_those_of_one_attack():
    whole = decisions([range(5)])
    renamed = whole.renamed("bim", "it")
    assert renamed.attacks == ["it"]
    assert all(map(torch.equal, renamed.of("it"), whole.of("bim")))


def test_rows_carry_whole_numbers_exactly():
    images, scores = torch.zeros(2, 3, 2, 2), torch.tensor([[0.0, 1.0, 3.0], [0.0, math.nan, 9.0]])
    attacked, numbers = images + 0.5, torch.tensor([2**62 + 1, 7])
    found = rows_of(images, attacked, torch.tensor([2, 2]), numbers, scores)
    assert found.index.tolist() == found.sample.tolist() == [2**62 + 1, 7]
    assert found.prediction.tolist() == [2, -1], "a logit that is not finite makes no class"
    assert found.correct.tolist() == [True, False]
    assert torch.isnan(found.gradient).all()
    assert found.linf.tolist() == [0.5, 0.5]
    assert found.l2.tolist() == pytest.approx([0.5 * 12**0.5] * 2)
    whole = ("index", "label", "prediction", "sample", "checked")
    assert all(
        values.dtype == (torch.long if name in whole else torch.float32) for name, values in found._asdict().items()
    )


def test_a_sample_is_placed_where_it_is_and_as_often_as_it_is_there():
    found = rows([3, 1, 2])._replace(sample=torch.tensor([30, 10, 20]))
    placed = found.placed({10: [(5, 10), (8, 11)], 30: [(2, 30)]})
    assert placed.index.tolist() == [2, 5, 8]
    assert placed.sample.tolist() == [30, 10, 11]
    assert torch.equal(placed.loss, rows([3, 1, 1]).loss)
    assert len(found.placed({}).index) == 0


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    whole = decisions([[7, 2], [5]], ("clean", "bim_eps0.1", "torchattacks.AutoAttack"))
    whole.save(tmp_path / "robustness.npz")
    assert same(load_decisions(tmp_path / "robustness.npz"), whole)
    with np.load(tmp_path / "robustness.npz") as file:
        assert file["index"].tolist() == [2, 5, 7]
        assert file["bim_eps0.1/correct"].tolist() == whole.of("bim_eps0.1").correct.tolist()


def test_nothing_evaluated_is_read_back_too(tmp_path):
    decisions([]).save(tmp_path / "empty.npz")
    assert same(load_decisions(str(tmp_path / "empty.npz")), decisions([]))


def test_the_same_decisions_make_the_same_file(tmp_path):
    """For any order of arrival and any time of writing."""
    decisions([range(9)]).save(tmp_path / "a.npz")
    decisions([[4, 2, 0], [8, 1, 3, 5, 6, 7]]).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def arrays(**changes):
    found = decisions([range(9)]).arrays()
    return {name: values for name, values in (found | changes).items() if values is not None}


@pytest.mark.parametrize(
    "content",
    [
        {"index": None},
        {"label": None},
        {"bim/loss": None},
        {"bim/prediction": np.arange(8)},
        {"index": np.arange(8)},
        {"label": np.arange(9).reshape(3, 3)},
        {"index": np.array(["a"] * 9)},
        {"bim/loss": np.array([{}] * 9, dtype=object)},
        dict.fromkeys([name for name in arrays() if name.startswith("clean/")]),
    ],
    ids=["no index", "no label", "no loss", "short", "long", "square", "text", "objects", "no clean"],
)
def test_arrays_that_do_not_belong_together_are_refused(content, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays(**content))
    with pytest.raises(ConfigurationError, match=r"x\.npz is not what RobustnessEvaluation wrote .*Give a robustness"):
        load_decisions(tmp_path / "x.npz")


def whole_file(tmp_path):
    decisions([range(500)]).save(tmp_path / "whole.npz")
    return (tmp_path / "whole.npz").read_bytes()


def flipped(content):
    """Return a file with one wrong bit in the middle of the packed data."""
    return content[:600] + bytes([content[600] ^ 255]) + content[601:]


def array_file(tmp_path):
    np.save(tmp_path / "array.npy", np.arange(3))
    return (tmp_path / "array.npy").read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: whole_file(folder)[:-200],
        lambda folder: whole_file(folder)[:20],
        lambda folder: flipped(whole_file(folder)),
        lambda folder: b"",
        lambda folder: b"not a file of arrays\n",
        array_file,
    ],
    ids=["truncated", "hardly begun", "damaged", "empty", "text", "one array"],
)
def test_other_files_are_refused(make, tmp_path):
    (tmp_path / "x.npz").write_bytes(make(tmp_path))
    with pytest.raises(ConfigurationError, match=r"x\.npz is not what RobustnessEvaluation wrote"):
        load_decisions(tmp_path / "x.npz")


def test_other_archives_folders_and_missing_files_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", weights=np.arange(3))
    for name in ("x.npz", "", "missing.npz"):
        with pytest.raises(ConfigurationError, match="is not what RobustnessEvaluation wrote"):
            load_decisions(tmp_path / name)


@pytest.mark.parametrize("at", range(40, 2400, 190))
def test_damage_anywhere_is_refused_or_harmless(at, tmp_path):
    content = whole_file(tmp_path)
    (tmp_path / "x.npz").write_bytes(content[:at] + bytes([content[at] ^ 90]) + content[at + 1 :])
    try:
        found = load_decisions(tmp_path / "x.npz")
    except ConfigurationError:
        return
    assert same(found, load_decisions(tmp_path / "whole.npz"))
