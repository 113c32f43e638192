"""The report's style sheet: system fonts, light and dark, a desk's width and a phone's."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d1f21; --soft: #5c6166; --line: #dfe1e3;
  --zebra: #f5f6f6; --mark: #8a4b00; --mark-bg: #fff1da; --diff: #fff6cf; --link: #0b5cad;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1d2024; --ink: #e7e8ea; --soft: #a2a8ae; --line: #33383d;
    --zebra: #22262a; --mark: #ffc879; --mark-bg: #43300f; --diff: #423c17; --link: #7db8f2;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "Liberation Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; line-height: 1.3; margin: 40px 0 10px; }
h3 { font-size: 15px; line-height: 1.35; margin: 0 0 6px; }
p { margin: 0 0 10px; max-width: 76ch; }
.meta, figcaption, .small { color: var(--soft); font-size: 13px; line-height: 1.45; }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: 0.92em;
}
p.small { margin: 8px 0 0; }
pre {
  margin: 8px 0 0; padding: 9px 12px; overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 7px 10px; text-align: right; vertical-align: baseline; white-space: nowrap; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: 12px; line-height: 1.3; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
.text { text-align: left; }
.middle { vertical-align: middle; }
thead .unit { display: block; font-weight: 400; }
.results th.name {
  position: sticky; left: 0; z-index: 1; background: var(--card); text-align: left;
  min-width: 190px; max-width: 260px; white-space: normal; overflow-wrap: anywhere;
}
.key { display: inline-block; width: 30px; height: 12px; margin-right: 7px;
  vertical-align: -1px; background: #fff; border-radius: 3px; }
.badge { display: inline-block; padding: 0 7px; border-radius: 9px; font-size: 12px;
  font-weight: 600; line-height: 18px; color: var(--mark); background: var(--mark-bg);
  white-space: normal; }
.stand { list-style: none; margin: 14px 0 0; padding: 0; }
.stand > li { padding: 10px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.stand > li:first-child { border-top: 0; }
.stand ul { margin: 4px 0 0; padding-left: 37px; }
.stand li li { max-width: 84ch; }
.note { border-left: 3px solid var(--mark); padding: 2px 0 2px 12px; margin: 14px 0; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px; }
figure { margin: 0; padding: 14px 14px 12px; }
figure .white { background: #ffffff; border-radius: 5px; padding: 4px; }
svg.plot { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 8px; font-size: 13px; }
.legend span { overflow-wrap: anywhere; }
figcaption { margin-top: 8px; }
.bar { display: flex; height: 13px; min-width: 160px; border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.times { position: relative; height: 22px; min-width: 260px; }
.times i { position: absolute; top: 4px; height: 14px; }
.times b { position: absolute; top: 4px; height: 14px; width: 1px; background: #fff; }
.times u { position: absolute; top: 0; height: 22px; width: 2px; margin-left: -1px;
  background: var(--ink); }
.chip { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin: 0 5px 0 12px; }
.legend .chip.tick { width: 4px; margin-left: 0; border: 1px solid var(--soft); }
.stages .group th { background: var(--zebra); padding-top: 9px; overflow-wrap: anywhere;
  white-space: normal; }
.stages tbody + tbody tr:first-child > * { border-top: 1px solid var(--line); }
.layers { display: flex; flex-wrap: wrap; gap: 2px; min-width: 170px; max-width: 340px; }
.layers.bare b { min-width: 8px; height: 14px; padding: 0; }
.layers b { min-width: 15px; padding: 0 2px; border-radius: 2px; background: var(--line);
  font: 600 10.5px/15px ui-monospace, Menlo, Consolas, "Liberation Mono", monospace;
  text-align: center; color: var(--ink); }
.layers b.copy { background: #0072B2; color: #fff; }
.layers b.new { background: #E69F00; color: #000; }
.config td, .config th { white-space: normal; overflow-wrap: anywhere; text-align: left;
  vertical-align: top; }
.config th { font-weight: 400; }
.config code { white-space: pre-wrap; }
.config tr.differs > * { background: var(--diff); }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--link); padding: 4px 0; }
dl { margin: 0; columns: 2 380px; column-gap: 36px; }
dl div { break-inside: avoid; padding-bottom: 10px; }
dt { font-weight: 600; }
dd { margin: 0; }
footer { margin-top: 44px; padding-top: 12px; border-top: 1px solid var(--line); }
@media (max-width: 760px) {
  main { padding: 18px 12px 40px; }
  h1 { font-size: 23px; }
  .figures { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  figure { padding: 10px 8px; }
  figure h3, .legend, figcaption { padding: 0 4px; }
  th, td { padding: 7px 8px; }
  .results th.name { min-width: 118px; max-width: 150px; }
  .config td, .config th { min-width: 110px; }
}
@media print {
  body { background: #fff; }
  figure, .stages tbody { break-inside: avoid; }
}
"""
