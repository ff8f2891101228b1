"""The page of ChannelEvaluation: its numbers are those of its record, and its text reads them correctly."""

from __future__ import annotations

from support.scripts import load_script

CHANNELS = load_script("docs/channels.py")
DATA = CHANNELS.recorded()


def right(curve: str, ratio: str) -> int:
    return DATA["curves"][curve][ratio]


def test_the_table_is_that_of_the_record() -> None:
    assert CHANNELS.PAGE.read_text(encoding="utf-8") == CHANNELS.page(), "run docs/pictures.py"


def test_the_text_reads_the_table_correctly() -> None:
    text = " ".join(CHANNELS.PAGE.read_text(encoding="utf-8").split())
    clean, images = DATA["clean"]
    assert f"{images} test images, {DATA['channels']} channels" in text
    assert r"5 % of the channels with the smallest \|γ\| cost more than 5 % drawn at random" in text
    assert right("gamma/zero", "0.05") < right("random/zero", "0.05")
    assert "`share` costs at most two points up to 20 %" in text
    assert all(clean - right("share/zero", ratio) <= 0.02 * images for ratio in ("0.05", "0.1", "0.2"))
    assert "up to 10 % it is the choice of layers" in text
    assert all(right("share/zero", ratio) <= right("share_shuffled/zero", ratio) for ratio in ("0.05", "0.1"))
    assert "at 20 and 30 % the order within layers counts as well" in text
    assert all(right("share/zero", ratio) > right("share_shuffled/zero", ratio) for ratio in ("0.2", "0.3"))
