"""Times of the day: what a text means, over midnight and over the week's end."""

import pytest

from liberatai_agent.windows import open_at, parse


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-06:00", [(0, 22 * 60), (6, 1439), (0, 0), (3, 359)], [(0, 360), (2, 22 * 60 - 1)]),
        ("08:00-17:30", [(0, 480), (6, 17 * 60 + 29)], [(0, 479), (0, 17 * 60 + 30)]),
        ("mon-fri 19:00-07:00", [(0, 1140), (4, 1439), (5, 419)], [(5, 1140), (0, 419), (5, 420), (6, 100)]),
        ("sat,sun", [(5, 0), (6, 1439)], [(0, 0), (4, 1439)]),
        ("sun 23:00-01:00", [(6, 1380), (0, 59)], [(0, 60), (5, 1400), (6, 30)]),
        ("fri-mon", [(4, 1), (5, 1), (6, 1), (0, 1)], [(1, 1), (3, 1)]),
        ("MON 00:00 - 24:00", [(0, 0), (0, 1439)], [(1, 0)]),
        ("tue 9:05-9:06", [(1, 545)], [(1, 544), (1, 546)]),
    ],
)
def test_a_window_holds_what_it_says(
    text: str, inside: list[tuple[int, int]], outside: list[tuple[int, int]]
) -> None:
    window = parse(text)
    assert [place for place in inside if not window.holds(*place)] == []
    assert [place for place in outside if window.holds(*place)] == []


@pytest.mark.parametrize(
    "text",
    ["", " ", "22-06", "25:00-26:00", "10:60-11:00", "10:00-10:00", "mo 10:00-11:00", "mon-xyz", "10:00", "mon,",
     "mon 10:00", "-", "10:00-11:00 mon", "1:1-2:2", "00:00-24:01", "x" * 10_000],
)  # fmt: skip
def test_what_is_no_window_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|begins when it ends"):
        parse(text)


def test_without_windows_every_time_is_open_and_several_add_up() -> None:
    assert open_at((), 3, 700)
    assert open_at(("01:00-02:00", "sat"), 5, 700)
    assert not open_at(("01:00-02:00", "sat"), 4, 700)
