"""The icons of the tray: a shape for each state, in a colour of its own. Pure, but for Pillow."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageDraw

from swarmkit_app.tray.face import Shape

_COLOURS: dict[Shape, str] = {
    "serving": "#2f9e44",
    "working": "#1971c2",
    "paused": "#868e96",
    "trouble": "#e03131",
}
_FINE = 8
"""Drawn so many times larger, then scaled down, which makes its edges smooth."""


@lru_cache
def icon(shape: Shape, side: int = 64) -> Image.Image:
    """Return the icon as RGBA, `side` x `side` pixels: a ring, a disc with an arrow, two bars, a triangle."""
    big = side * _FINE
    image = Image.new("RGBA", (big, big), (0, 0, 0, 0))
    draw, colour = ImageDraw.Draw(image), _COLOURS[shape]

    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [left * big, top * big, right * big, bottom * big]

    if shape == "serving":
        draw.ellipse(box(0.08, 0.08, 0.92, 0.92), outline=colour, width=int(0.16 * big))
    elif shape == "working":
        draw.ellipse(box(0.05, 0.05, 0.95, 0.95), fill=colour)
        draw.polygon(
            [(0.38 * big, 0.27 * big), (0.38 * big, 0.73 * big), (0.75 * big, 0.5 * big)], fill="white"
        )
    elif shape == "paused":
        draw.rounded_rectangle(box(0.16, 0.1, 0.42, 0.9), radius=0.06 * big, fill=colour)
        draw.rounded_rectangle(box(0.58, 0.1, 0.84, 0.9), radius=0.06 * big, fill=colour)
    else:
        corners = [(0.5 * big, 0.04 * big), (0.98 * big, 0.94 * big), (0.02 * big, 0.94 * big)]
        draw.polygon(corners, fill=colour)
        draw.rounded_rectangle(box(0.45, 0.34, 0.55, 0.66), radius=0.05 * big, fill="white")
        draw.ellipse(box(0.44, 0.72, 0.56, 0.84), fill="white")
    return image.resize((side, side), Image.Resampling.LANCZOS)
