"""HTML and SVG elements, in which text is always escaped: a class may be called `<script>`."""

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, *children: "str | float | Markup | None", **attributes: "str | float | bool | None") -> Markup:
    """Make an element.

    Args:
        name: the tag.
        children: text, which is escaped, or markup, which is not; None is left out.
        attributes: `class_` is written `class` and `stroke_width` `stroke-width`; numbers are written short; True
            stands without a value; None and False are left out.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    inside = "".join(_text(child) for child in children if child is not None)
    return Markup(f"<{name}{written}>{inside}</{name}>")


def joined(parts: Iterable[Markup]) -> Markup:
    """Put elements one after the other."""
    return Markup("".join(parts))


def short(number: float) -> str:
    """Write a coordinate: a tenth of a pixel is enough."""
    return f"{number:.1f}".removesuffix(".0")


def _text(child: "str | float | Markup") -> str:
    if isinstance(child, Markup):
        return child
    return html.escape(child, quote=False) if isinstance(child, str) else short(child)


def _attribute(key: str, value: "str | float | bool | None") -> str:
    if value is None or value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{html.escape(value) if isinstance(value, str) else short(value)}"'
