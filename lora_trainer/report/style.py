"""How the page looks: by day and by night, on a screen and on paper."""

STYLE = """
:root { --text: #1f2328; --quiet: #59636e; --back: #ffffff; --panel: #f6f8fa; --border: #d1d9e0; --accent: #0969da;
  --good: #1a7f37; --warm: #bc4c00; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --quiet: #9198a1; --back: #0d1117; --panel: #151b23;
  --border: #3d444d; --accent: #4493f8; --good: #3fb950; --warm: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--text); background: var(--back); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { margin: 32px 0 12px; padding-bottom: 4px; border-bottom: 1px solid var(--border); font-size: 20px; }
p { margin: 8px 0; overflow-wrap: anywhere; }
footer { padding: 24px; text-align: center; color: var(--quiet); }
.verdict { padding: 10px 14px; border-left: 4px solid var(--accent); background: var(--panel); }
table { border-collapse: collapse; max-width: 100%; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--border); text-align: left; vertical-align: top;
  white-space: pre-line; overflow-wrap: break-word; }
td code { word-break: break-all; }
th { font-weight: 600; }
.facts th { color: var(--quiet); font-weight: normal; white-space: nowrap; }
td.other { color: var(--warm); font-weight: 600; }
code { font-size: 13px; overflow-wrap: anywhere; }
figure { margin: 0; }
section > figure { margin-bottom: 20px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; }
svg path { fill: none; stroke-width: 1.5; }
svg .grid { stroke: var(--border); stroke-width: 1; }
.line.raw { stroke: var(--accent); opacity: 0.4; stroke-width: 1; }
.line.mean { stroke: var(--accent); }
.line.validation { stroke: var(--good); }
.line.training { stroke: var(--good); stroke-dasharray: 3 3; }
circle { fill: var(--accent); }
circle.validation, circle.training { fill: var(--good); }
.legend { margin-left: 14px; color: var(--quiet); font-size: 13px; }
.legend::before { content: ""; display: inline-block; width: 18px; margin-right: 5px; vertical-align: middle;
  border-top: 2px solid var(--accent); }
.legend.raw::before { opacity: 0.4; }
.legend.validation::before { border-color: var(--good); }
.legend.training::before { border-top: 2px dotted var(--good); }
.film { display: flex; gap: 8px; overflow-x: auto; padding-bottom: 6px; }
.film figure { flex: none; max-width: 224px; }
.film figcaption, .pictures figcaption { color: var(--quiet); font-size: 12px; }
.film img, .pictures img { display: block; border-radius: 4px; }
img.grid { max-width: 100%; border-radius: 4px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 12px; margin-top: 12px; }
.pictures figcaption { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  overflow-wrap: anywhere; }
.pictures i { display: block; color: var(--good); font-style: normal; font-weight: 600; }
blockquote { margin: 8px 0; padding: 4px 14px; border-left: 3px solid var(--border); white-space: pre-wrap; }
@media print { section { break-inside: avoid-page; } .film { flex-wrap: wrap; } }
"""
