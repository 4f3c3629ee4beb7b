"""Pieces of a self-contained page: styles inline, pictures as data URIs, nothing fetched."""

import base64
import dataclasses
from collections.abc import Sequence
from html import escape

from etils import epath

STYLE = """
:root { --ink: #1c2126; --soft: #5d6770; --line: #dfe3e7; --wash: #f5f7f8; --mark: #0b5f8f; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.what, .note, figcaption, .interval { color: var(--soft); }
.note { font-size: .9rem; }
.headline { font-size: 1.18rem; line-height: 1.5; margin: 1.4rem 0; padding: .2rem 0 .2rem 1rem;
  border-left: 4px solid var(--mark); }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  margin: 1.2rem 0; }
.tile { background: var(--wash); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tile span { font-size: .85rem; }
.interval { font-size: .82em; white-space: nowrap; display: block; }
.runs { white-space: normal; }
.figures { display: grid; gap: 1.2rem 1.4rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 1rem 0; max-width: 46rem; break-inside: avoid; }
.figures figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: .5rem 0 1rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .45rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; font-size: .82rem; line-height: 1.25; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; font-weight: 600; padding-left: 0; }
table.plain td { text-align: left; font-weight: 400; overflow-wrap: anywhere; }
table.plain td:first-child { color: var(--soft); width: 40%; }
.cards { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem .7rem;
  break-inside: avoid; min-width: 0; }
.card h4, .query h4 { font-size: .98rem; margin: 0 0 .35rem; }
.card h4 span { color: var(--soft); font-weight: 400; }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem; }
.halves > div { min-width: 0; }
.halves.one { grid-template-columns: 1fr; }
.halves h5, .query h5 { font-size: .82rem; font-weight: 600; color: var(--soft);
  margin: 0 0 .3rem; }
.halves img { display: block; width: 7rem; max-width: 100%; height: auto; }
.card ol { list-style: none; margin: .35rem 0; padding: 0; font-size: .88rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.card li { display: flex; justify-content: space-between; gap: .6rem; margin: .15rem 0; }
.card li > :first-child { overflow-wrap: anywhere; min-width: 0; }
.card li > :last-child { color: var(--soft); }
.card .note { margin: .3rem 0 0; }
.target { color: #a34700; font-weight: 600; }
.query { margin: 1.3rem 0; }
.strip { display: grid; grid-template-columns: repeat(5, minmax(0, 6.5rem)); gap: .6rem;
  margin: 0 0 .8rem; font-size: .82rem; line-height: 1.3; }
.strip figure { margin: 0; }
.strip figcaption { font-size: inherit; overflow-wrap: anywhere; }
.strip .hit img { outline: 3px solid #D55E00; outline-offset: -3px; }
.coarse { image-rendering: pixelated; }
.columns { columns: 20rem 2; font-size: .9rem; margin: .4rem 0 1rem; padding-left: 1.3rem; }
pre { background: var(--wash); padding: .7rem .9rem; border-radius: .5rem; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--mark); }
@media (max-width: 44rem) {
  main { padding: 1.3rem 1rem 3rem; } h1 { font-size: 1.45rem; } .headline { font-size: 1.08rem; }
  table.wide thead { display: none; }
  table.wide, table.wide tbody, table.wide tr, table.wide td { display: block; width: 100%; }
  table.wide tr { border: 1px solid var(--line); border-radius: .5rem; margin: 0 0 .8rem;
    padding: .45rem .8rem; }
  table.wide td { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: .16rem 0; }
  table.wide td::before { content: attr(data-label); color: var(--soft); text-align: left; }
  table.wide td:first-child { font-size: 1.02rem; }
  table.wide td:first-child::before { content: none; }
  table.wide td:empty { display: none; }
  table.wide .interval { display: inline; margin-left: .5em; white-space: normal; }
  table.wide .runs { display: block; margin: 0; }
  table.wide td > span { text-align: right; }
}
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; } h2 { margin-top: 1.4rem; }
  h2, h3 { break-after: avoid; } tr, .tile { break-inside: avoid; }
  .tile, pre { border: 1px solid var(--line); } details { display: none; }
}
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG with what it shows: `alt` for who cannot see it, `caption` for who can."""
    name: str
    png: bytes
    alt: str
    caption: str


class Raw(str):
    """Text that is HTML already."""


def text(value) -> str:
    """Escapes a value unless it is HTML already."""
    return value if isinstance(value, Raw) else escape(str(value))


def page(title: str, sections: Sequence[str]) -> str:
    """A whole document."""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
            + "\n".join(sections) + "\n</main></body></html>\n")


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; empty parts are left out."""
    return f"<section><h2>{text(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def paragraph(content, kind: str = "") -> str:
    """A paragraph; kind is a class of the style sheet, such as "note"."""
    return f'<p{f" class={kind}" if kind else ""}>{text(content)}</p>'


def figure(picture: Picture) -> str:
    """A picture with its caption."""
    data = base64.b64encode(picture.png).decode()
    return (f'<figure><img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text(picture.caption)}</figcaption></figure>")


def image(png: bytes, alt: str, *, side: int) -> str:
    """A small picture within text; pixels of an image below 100 px a side stay squares."""
    data = base64.b64encode(png).decode()
    kind = ' class="coarse"' if side < 100 else ""
    return f'<img{kind} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def figures(pictures: Sequence[Picture]) -> str:
    """Pictures side by side where the screen is wide enough; a single one takes half."""
    return f'<div class="figures">{"".join(map(figure, pictures))}</div>' if pictures else ""


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table of figures; on a phone every row becomes a card, labelled by the header."""
    head = "".join(f"<th>{text(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f'<td data-label="{escape(h)}">{_cell(c)}</td>'
                         for h, c in zip(header, row, strict=True)) + "</tr>"
        for row in rows)
    return f'<table class="wide"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def pairs(rows: Sequence[tuple]) -> str:
    """A table of names and values."""
    body = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in rows)
    return f'<table class="plain"><tbody>{body}</tbody></table>'


def percent(value: float | None, interval: Sequence[float] | None = None, *,
            signed: bool = False) -> str:
    """A rate as a percentage, with its interval below; a dash where it is unknown."""
    if value is None:
        return "–"
    out = number(value, signed=signed) + "&nbsp;%"
    if interval is not None:
        low, high = (number(v, signed=signed) for v in interval)
        out += f'<span class="interval">{low} to {high}</span>'
    return Raw(out)


def number(share: float, *, signed: bool = False) -> str:
    """A share in percent with one decimal and a real minus sign; never minus zero."""
    value = round(100 * share, 1) + 0.0
    return f"{value:{'+' if signed else ''}.1f}".replace("-", "\N{MINUS SIGN}")


def write(folder: epath.Path, document: str, pictures: Sequence[Picture]) -> epath.Path:
    """Writes index.html, and the pictures beside it; gives the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    path = folder / "index.html"
    path.write_text(document)
    return path


def _cell(content):
    return f"<span>{text(content)}</span>" if content != "" else ""

