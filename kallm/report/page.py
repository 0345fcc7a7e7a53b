"""The page around the report: its style, and the small pieces of HTML. One file, no network, for screen and paper."""

import html
from collections.abc import Iterable, Sequence

__all__ = ["COLOURS", "escape", "make_page", "make_section", "make_table"]

COLOURS = """
:root { color-scheme: light dark;
  --paper:#fdfcf9; --ink:#22211e; --faint:#6f6b63; --rule:#d9d4c8; --band:#eeeadf; --accent:#8a3b22;
  --c0:#7d7a73; --c1:#2f6690; --c2:#b5472b; --c3:#c28a1b; --c4:#3f7d58; --c5:#7a5195; --c6:#a0627a; --c7:#4d8f9c;
  --c8:#8c6d46; --c9:#5b6b2f; }
@media (prefers-color-scheme: dark) { :root {
  --paper:#191816; --ink:#e9e5dc; --faint:#a39d91; --rule:#3d3a34; --band:#292723; --accent:#e0906f;
  --c0:#a19d94; --c1:#7fb2da; --c2:#ec8465; --c3:#e3b455; --c4:#82c29b; --c5:#bd9bd6; --c6:#dc9db6; --c7:#85c6d2;
  --c8:#cbab82; --c9:#a6b86f; } }
"""
"""The colours of pages and figures, on light and on dark ground."""

_CSS = """
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0; background:var(--paper); color:var(--ink);
  font:17px/1.55 "Iowan Old Style","Palatino Linotype",Palatino,"Source Serif 4",Charter,"DejaVu Serif",Georgia,serif; }
main { max-width:72rem; margin:0 auto; padding:3.5rem 1.5rem 5rem; }
.prose { max-width:42rem; }
h1 { font-size:1rem; font-weight:400; margin:0 0 1.6rem; color:var(--faint); letter-spacing:.02em; }
h1 b { color:var(--ink); font-weight:600; }
h2 { font-size:1.25rem; font-weight:600; margin:3.6rem 0 .8rem; }
.verdict { font-size:clamp(1.5rem,4.2vw,2.3rem); line-height:1.22; margin:0 0 .8rem; max-width:30ch;
  text-wrap:balance; }
.verdict span { display:inline-block; }
.verdict em { color:var(--accent); font-style:normal; }
.lede { color:var(--faint); margin:0; max-width:42rem; }
.warning { border-left:3px solid var(--accent); padding:.1rem 0 .1rem .9rem; margin:1.4rem 0 0; max-width:42rem; }
table,svg,code,.small { font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
.scroll { overflow-x:auto; margin:0 -1.5rem; padding:0 1.5rem; -webkit-overflow-scrolling:touch; }
table { border-collapse:collapse; font-size:.8rem; line-height:1.35; font-variant-numeric:tabular-nums; }
th,td { padding:.42rem .8rem; text-align:right; white-space:nowrap; vertical-align:baseline; }
th { font-weight:400; color:var(--faint); vertical-align:bottom; }
thead tr:last-child th { border-bottom:1px solid var(--ink); }
thead tr:first-child th { border-top:1px solid var(--ink); }
thead th.group { text-align:center; color:var(--ink); }
thead th.group span { display:block; border-bottom:1px solid var(--rule); padding-bottom:.25rem; }
tbody th { text-align:left; color:var(--ink); font-weight:600; position:sticky; left:0; background:var(--paper); }
tr:first-child > th:first-child, tbody th { padding-left:0; text-align:left; }
thead th[rowspan] { border-bottom:1px solid var(--ink); }
tbody tr + tr td, tbody tr + tr th { border-top:1px solid var(--band); }
tbody tr.reference th { font-weight:400; font-style:italic; color:var(--faint); }
tbody tr.reference td { color:var(--faint); }
tbody tr.reference.first td, tbody tr.reference.first th { border-top:1px solid var(--rule); }
tbody:last-child tr:last-child > * { border-bottom:1px solid var(--ink); }
td.words { white-space:normal; text-align:left; min-width:13rem; }
td.left { text-align:left; }
td i { font-style:normal; color:var(--faint); }
.figures { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr)); gap:2.4rem 3.2rem;
  align-items:start; }
figure { margin:0; min-width:0; max-width:35rem; }
figcaption { font-size:.92rem; line-height:1.4; margin:0 0 .5rem; }
figcaption b { font-weight:600; }
figcaption span { color:var(--faint); }
svg { display:block; width:100%; height:auto; }
ul.contrasts, ul.notes { padding:0; margin:0; list-style:none; max-width:48rem; }
ul.contrasts li { padding:.55rem 0; border-top:1px solid var(--band); }
ul.contrasts li:first-child { border-top:0; }
ul.contrasts .word { font-weight:600; }
ul.contrasts small { font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
ul.contrasts small, .small { color:var(--faint); font-size:.8rem; line-height:1.45; display:block; }
ul.notes li { padding:.25rem 0 .25rem 1.2rem; text-indent:-1.2rem; }
ul.notes li::before { content:"– "; color:var(--faint); }
ul.hashes { overflow-wrap:anywhere; }
details { margin-top:1rem; } details .figures { margin-top:1.2rem; }
details p.small { margin:1.6rem 0 0; }
summary { cursor:pointer; color:var(--accent); padding:.3rem 0; }
code { font-size:.92em; font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; }
.state-failed,.state-diverged,.state-stale { color:var(--accent); font-weight:600; }
footer { margin-top:4rem; border-top:1px solid var(--rule); padding-top:.8rem; }
@media (max-width:40rem) { body { font-size:16px; } main { padding:2rem 1.1rem 3rem; }
  .scroll { margin:0 -1.1rem; padding:0 1.1rem; } h2 { margin-top:2.6rem; } }
@media print { :root { --paper:#fff; --ink:#000; --faint:#555; --rule:#ccc; --band:#eee; --accent:#000; }
  main { max-width:none; padding:0; } figure, li, tr { break-inside:avoid; } h2 { break-after:avoid; }
  .scroll { overflow:visible; } table { font-size:.6rem; } th,td { padding:.25rem .4rem; }
  .figures { grid-template-columns:1fr 1fr; } }
"""


def escape(text: str) -> str:
    """Return text as HTML."""
    return html.escape(text, quote=True)


def make_page(title: str, body: Iterable[str]) -> str:
    """Return the whole page around its body."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{COLOURS}{_CSS.lstrip()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def make_section(title: str, *parts: str) -> str:
    """Return a section with its heading, or nothing where it has no parts."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def make_table(label: str, head: Sequence[str], bodies: Iterable[str]) -> str:
    """Return a table, from rows of HTML, that scrolls sideways where the page is narrow."""
    rows = "\n".join(f"<tr>{row}</tr>" for row in head)
    inner = f"<thead>\n{rows}\n</thead>\n<tbody>\n{chr(10).join(bodies)}\n</tbody>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>\n{inner}\n</table></div>'
    )
