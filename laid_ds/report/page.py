"""The page around the parts: its look in light, dark, on a phone and on paper, and the few lines of script that sort tables."""

from __future__ import annotations

import html
from collections.abc import Sequence

from laid_ds.report.palette import variables

STYLE = """
*{box-sizing:border-box}
html{text-size-adjust:100%;-webkit-text-size-adjust:100%}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:74rem;padding:1rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;border-top:1px solid var(--grid);padding-top:1rem;margin-top:2rem}h3{font-size:1rem}
h4{margin:0 0 .4rem;font-size:.95rem}a{color:inherit}nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem}
p,li,dd,pre,summary{overflow-wrap:anywhere}
.lead li{margin:.2rem 0}.note,small{color:var(--muted);font-size:.85rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
figure{margin:0;min-width:0;break-inside:avoid}figure.wide{grid-column:1/-1}figure svg{width:100%;height:auto;display:block}
figcaption{font-size:.85rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;margin:.8rem 0;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;border-bottom:1px solid var(--grid);text-align:right;vertical-align:top}
td{white-space:nowrap}th.text{text-align:left}td.text{white-space:normal;text-align:left;min-width:13rem;max-width:34rem;overflow-wrap:anywhere}td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
th{cursor:pointer;white-space:nowrap}th[aria-sort=ascending]::after{content:" \\2191"}th[aria-sort=descending]::after{content:" \\2193"}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}
pre{background:color-mix(in srgb,var(--grid) 40%,transparent);padding:.7rem;white-space:pre-wrap;font-size:.8rem}
details{margin:.6rem 0}summary{cursor:pointer}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem}
article{border:1px solid var(--grid);border-left:4px solid #1a8a3c;padding:.6rem;min-width:0;break-inside:avoid;overflow-wrap:anywhere}
article.wrong{border-left-color:#d4002a}article img{max-width:100%;height:auto}
dl{margin:.4rem 0;display:grid;grid-template-columns:auto 1fr;gap:.1rem .6rem}dt{color:var(--muted)}dd{margin:0;min-width:0}
@media print{body{max-width:none;font-size:11pt}nav{display:none}.scroll{overflow:visible}table{font-size:8pt}
td,th,td.text{white-space:normal;min-width:0;padding:.15rem .3rem}
.figures{grid-template-columns:1fr 1fr}}
"""
SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  const sort = () => {
    const table = head.closest("table"), column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    const value = row => row.cells[column].textContent.replace(/,(?=\\d{3})/g, "");
    const number = text => parseFloat(text.replace(/^[<>]= /, ""));
    const words = text => isNaN(number(text));
    const compare = (a, b) => words(a) || words(b) ? words(a) - words(b) || a.localeCompare(b) : number(a) - number(b);
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
    table.tBodies[0].append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, lead: Sequence[str], sections: Sequence[str], anchors: dict[str, str]) -> str:
    """One HTML file that needs nothing else, and may fetch nothing else. anchors: of the sections -> their titles."""
    links = "".join(f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name in anchors.items())
    told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in lead)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{_colours()}{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1><ul class=lead>{told}</ul><nav>{links}</nav>{''.join(sections)}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _colours() -> str:
    """The variables in light, and in dark where the reader's system asks for it; paper is light."""
    light = ";".join(f"{name}:{colour}" for name, colour, _ in variables().values())
    dark = ";".join(f"{name}:{colour}" for name, _, colour in variables().values())
    return f":root{{{light};color-scheme:light dark}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
