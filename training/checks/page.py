"""The report as one HTML file: everything inside, nothing fetched, nothing run.

Owns how findings look. Names of files and classes come from elsewhere: every text is escaped, and the page forbids
scripts to itself.
"""

import base64
from collections.abc import Iterator
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from app.images import FORMATS
from training.atomic import replacing
from training.checks.findings import KINDS, Checked, Finding, Kind
from training.data.listing import Picture

SHOWN = 200
"""Findings of a kind that are shown; all are in the JSON."""
SHOWN_OF_GROUP = 12
MOST_OPEN = 30
"""Classes; the table of more is folded up."""
THUMB = 96
QUALITY = 80
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin:2rem 0 .2rem}p{margin:.2rem 0 .8rem}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.error{color:#b42318}.warning{color:#9a6700}.note{color:#57606a}
.items{display:flex;flex-wrap:wrap;gap:.6rem}
.item{border:1px solid #d0d7de;border-radius:6px;padding:.5rem;max-width:100%}
.pictures{display:flex;flex-wrap:wrap;gap:.5rem}figure{margin:0;width:104px;overflow-wrap:anywhere;font-size:12px}
img{display:block;width:96px;height:96px;object-fit:contain;background:#f6f8fa;image-rendering:pixelated}
.said{font-size:12px;color:#57606a;max-width:22rem;overflow-wrap:anywhere}b.to{color:#1a7f37}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}.item{border-color:#30363d}img{background:#161b22}
.error{color:#ff7b72}.warning{color:#d29922}.note,.said{color:#9198a1}b.to{color:#3fb950}}
"""


def write_page(checked: Checked, path: Path) -> None:
    """Write the report."""
    with replacing(path) as file:
        for piece in _page(checked):
            file.write(piece.encode())


def _page(checked: Checked) -> Iterator[str]:
    title = f"Data check: {escape(Path(checked.data).name)}"
    yield (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>"
    )
    yield f"<p>{escape(verdict(checked))}</p>"
    yield _overview(checked)
    yield _classes(checked)
    for name, kind in KINDS.items():
        if found := checked.of_kind(name):
            yield from _section(checked, name, kind, found)
    yield "</html>\n"


def verdict(checked: Checked) -> str:
    """Say in one sentence what came of it."""
    images, classes = len(checked.labels), len(checked.classes)
    about = f"{images:,} images of {classes:,} classes, {checked.division}"
    if not checked.findings:
        return f"{about}: nothing was found."
    if checked.is_fit:
        return f"{about}: nothing forbids training on them, but look at what was found."
    return f"{about}: do not train on them before the errors are mended."


def _overview(checked: Checked) -> str:
    rows = [
        f'<tr><td class="{kind.severity}">{kind.severity}</td><td><a href="#{name}">{escape(kind.title)}</a></td>'
        f'<td class="n">{len(found):,}</td></tr>'
        for name, kind in KINDS.items()
        if (found := checked.of_kind(name))
    ]
    return f'<table><tr><th></th><th>finding</th><th class="n">count</th></tr>{"".join(rows)}</table>' if rows else ""


def _classes(checked: Checked) -> str:
    counts, sizes = checked.counts(), checked.sizes()
    head = "".join(f'<th class="n">{escape(part)}</th>' for part in counts)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="n">{counts[part][name]:,}</td>' for part in counts)
        + "</tr>"
        for name in checked.classes
    )
    spreads = "".join(
        f"<tr><td>{what}</td>"
        + "".join(f'<td class="n">{sizes[name][which]:,.0f}</td>' for which in ("min", "median", "max"))
        for name, what in (("width", "width, pixels"), ("height", "height, pixels"), ("size_bytes", "file, bytes"))
        if sizes
    )
    spread_head = "".join(f'<th class="n">{which}</th>' for which in ("least", "median", "most"))
    shown = " open" if len(checked.classes) <= MOST_OPEN else ""
    return (
        f"<h2>Classes and sizes</h2><details{shown}><summary>Images by class</summary>"
        f"<table><tr><th>class</th>{head}</tr>{rows}</table></details>"
        f"<table><tr><th></th>{spread_head}</tr>{spreads}</table>"
    )


def _section(checked: Checked, name: str, kind: Kind, found: list[Finding]) -> Iterator[str]:
    severity = f'<span class="{kind.severity}">{kind.severity}</span>'
    yield f'<h2 id="{name}">{severity} {escape(kind.title)}: {len(found):,}</h2>'
    yield f'<p>{escape(kind.advice)}</p><div class="items">'
    for finding in found[:SHOWN]:
        figures = "".join(_figure(checked, place, finding) for place in finding.places[:SHOWN_OF_GROUP])
        left = len(finding.places) - SHOWN_OF_GROUP
        more = f"<div>and {left:,} more</div>" if left > 0 else ""
        said = f'<div class="said">{escape(finding.sentence)}</div>'
        yield f'<div class="item"><div class="pictures">{figures}{more}</div>{said}</div>'
    yield "</div>"
    if len(found) > SHOWN:
        yield f"<p>The first {SHOWN} of {len(found):,}; check.json has all.</p>"


def _figure(checked: Checked, place: int, finding: Finding) -> str:
    picture = checked.survey.pictures[place]
    label = f"<b>{escape(checked.classes[checked.labels[place]])}</b>"
    if finding.suggested:
        label = f'{label} → <b class="to">{escape(finding.suggested)}</b>'
    drawn = "" if checked.survey.looks[place].fault else f'<img alt="" src="{_inlined(picture)}">'
    return f"<figure>{drawn}{label}<br>{escape(picture.name)}</figure>"


def _inlined(picture: Picture) -> str:
    """Return a small JPEG of the whole picture as a data URL."""
    with Image.open(BytesIO(picture.encoded()), formats=FORMATS) as image:
        image.draft(None, (2 * THUMB, 2 * THUMB))
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail((THUMB, THUMB))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
