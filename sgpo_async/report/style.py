"""The page's style sheet, with one palette for the light and one for the dark colour scheme.

Every colour of a curve has a contrast of at least 3 to the card, and texts in charts have at least 11 pixels.
"""

SHADES = 20  # CSS classes k1 to k20 of a token's shading

# Widths of a chart in pixels, each the lowest one, and the size of its texts in units of the drawing (`svg.WIDTH`): a
# wider chart is drawn larger, and its texts would be, too.
FONTS = ((0, 18.0), (300, 15.0), (360, 12.5), (440, 10.5), (540, 9.0), (640, 8.0), (800, 7.0))

STYLE = """
:root { color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1c1d1f; --soft: #5d6167; --line: #e3e4e2; --axis: #9a9da1;
  --c1: #2468c8; --c2: #c8640a; --c3: #12826a; --c4: #8a4fc0; --alarm: #b3261e;
  --lag0: #2fa199; --lag1: #2f82a1; --lag2: #2f65a3; --lag3: #2d4a9b; --lag4: #34298f; --lag5: #30174e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131416; --card: #1c1e21; --ink: #eceded; --soft: #a3a8ae; --line: #30343a; --axis: #6d7278;
  --c1: #6aa5f5; --c2: #f2a04a; --c3: #4cc9a8; --c4: #c396f0; --alarm: #ff8a7d;
  --lag0: #3e6acf; --lag1: #3888cd; --lag2: #32a6c9; --lag3: #32c6bc; --lag4: #85e0b3; --lag5: #eef0c1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; font-weight: 650; }
h2 { font-size: 16px; margin: 0; font-weight: 600; }
header > p { color: var(--soft); margin: 4px 0 0; }
.alarm { background: var(--card); border: 1px solid var(--alarm); border-left-width: 5px; border-radius: 10px;
  padding: 12px 16px; margin: 24px 0 0; } .alarm b { color: var(--alarm); }
.advice { border-color: var(--c2); margin-top: 12px; } .advice b { color: var(--c2); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0; }
.tile, figure, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; flex: 1 1 140px; }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 16px 16px 10px; display: flex; flex-direction: column; justify-content: space-between;
  container-type: inline-size; min-width: 0; }
.group { font-size: 19px; margin: 32px 0 12px; }
.without { grid-column: 1 / -1; margin: 0; color: var(--soft); font-size: 14px; } .without b { color: var(--ink); }
figcaption p { margin: 2px 0 6px; color: var(--soft); font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin-bottom: 4px; }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key i { width: 14px; height: 3px; border-radius: 2px; background: currentColor; }
.key i.ring { width: 10px; height: 10px; border-radius: 50%; background: none; border: 2px solid currentColor; }
.key i.dash { height: 0; border-top: 2px dashed; border-radius: 0; background: none; }
.key i[class^="lag"] { height: 12px; border-radius: 3px; background: var(--own); }
svg { width: 100%; height: auto; display: block; overflow: visible; }
.grid { stroke: var(--line); } .axis { stroke: var(--axis); }
text { fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid, .axis, .line, .dot { vector-effect: non-scaling-stroke; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; opacity: .35; } .dashed { stroke-width: 1.2; stroke-dasharray: 3 4; opacity: .8; }
.bound { stroke-width: 1.5; stroke-dasharray: 7 5; stroke-linecap: butt; }
.dot { fill: var(--card); stroke: currentColor; stroke-width: 2; }
svg rect[class^="lag"] { shape-rendering: crispEdges; }
.tip { fill: var(--ink); opacity: 0; } .tip:hover { opacity: .07; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--soft); }
.lag0 { fill: var(--lag0); --own: var(--lag0); }
.lag1 { fill: var(--lag1); --own: var(--lag1); }
.lag2 { fill: var(--lag2); --own: var(--lag2); }
.lag3 { fill: var(--lag3); --own: var(--lag3); }
.lag4 { fill: var(--lag4); --own: var(--lag4); }
.lag5 { fill: var(--lag5); --own: var(--lag5); }
section { margin-top: 16px; padding: 16px; overflow-x: auto; }
table { border-collapse: collapse; margin-top: 8px; font-variant-numeric: tabular-nums; }
td { padding: 4px 24px 4px 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child td { border-top: 0; } td:first-child { color: var(--soft); white-space: nowrap; }
pre, code { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
section > p { margin: 2px 0 0; color: var(--soft); font-size: 13px; }
.samples td { padding-right: 16px; font-size: 13px; } .samples .head td { color: var(--soft); padding-top: 10px; }
.samples .n { text-align: right; white-space: nowrap; } .samples i { color: var(--soft); display: block; }
.samples q { quotes: none; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace;
  display: block; max-height: 16em; overflow-y: auto; }
.samples .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 0 24px; align-items: start; }
.samples .sides table:only-child { grid-column: 1 / -1; }
.samples .right { color: var(--c3); } .samples .wrong { color: var(--alarm); }
mark { color: inherit; background: none; border-radius: 3px; } mark.left-out { text-decoration: line-through; }
summary { cursor: pointer; color: var(--soft); margin-top: 10px; }
"""
STYLE += "".join(f"mark.k{n} {{ background: rgb(226 116 20 / {n / SHADES:.2f}); }}\n" for n in range(1, SHADES + 1))
STYLE += "".join(f"@container (min-width: {width}px) {{ text {{ font-size: {size}px; }} }}\n" for width, size in FONTS)
STYLE += """@media (max-width: 600px) { main { padding: 16px 12px 40px; } figure, section { padding: 12px; }
  .samples .sides { grid-template-columns: 1fr; }
  .tile { flex-basis: 120px; padding: 10px 12px; } .tile b { font-size: 18px; } }
"""
