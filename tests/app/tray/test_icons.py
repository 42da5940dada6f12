"""The icons are told apart by their shape, for those who do not see their colours."""

from __future__ import annotations

from itertools import combinations

from PIL import ImageChops, ImageStat
from swarmkit_app.tray.face import Shape
from swarmkit_app.tray.icons import icon

SHAPES: tuple[Shape, ...] = ("serving", "working", "paused", "trouble")


def test_no_two_icons_have_one_shape() -> None:
    for one, other in combinations(SHAPES, 2):
        outlines = icon(one, 22).getchannel("A"), icon(other, 22).getchannel("A")
        differs = ImageStat.Stat(ImageChops.difference(*outlines)).mean[0] / 255
        assert differs > 0.15, (one, other)


def test_an_icon_has_the_size_that_a_panel_asks_for() -> None:
    assert [icon("paused", side).size for side in (22, 48)] == [(22, 22), (48, 48)]
