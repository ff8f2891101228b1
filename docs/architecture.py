"""Generator of docs/pictures/architecture.svg, the parts of the package and their imports, read from the source.

Run it after a part or an import between parts was added: ``python docs/architecture.py``. A test checks that the
picture is up to date.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_normgeo"
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"
PARTS = {
    "geometry": "formulas: tensors to tensors",
    "normalization": "swap_norm, scale-invariant units",
    "symmetries": "scale_symmetries of whole networks",
    "models": "ResNetClassifier",
    "probes": "read a running training",
    "robustness": "attacks and their statistics",
    "channels": "importance and masks",
    "runs": "records of runs on disk",
    "data": "data modules",
    "callbacks": "monitors for a Trainer",
    "report": "figures, tables, W&B",
    "terminal": "help without torch",
    "cli": "normgeo fit, test, …",
    "study": "normgeo study",
}
"""Parts in the picture and their captions; ``utilities`` and ``errors`` are omitted because all parts use them."""
_WIDTH, _HEIGHT, _GAP, _RISE, _MARGIN = 186, 48, 22, 40, 16


def imports() -> dict[str, set[str]]:
    """Return for each part the other parts that it imports."""
    found: dict[str, set[str]] = {}
    for part in PARTS:
        names: set[str] = set()
        for file in sorted((PACKAGE / part).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    names.add(node.module or "")
                elif isinstance(node, ast.Import):
                    names.update(alias.name for alias in node.names)
        parts = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}.")}
        found[part] = parts & (PARTS.keys() - {part})
    return found


def floors(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the rows of the picture, the lowest first: each part is one row below the lowest part that imports it."""
    depth: dict[str, int] = {}

    def below_top(part: str) -> int:
        if part not in depth:
            users = [other for other, used in edges.items() if part in used]
            depth[part] = 1 + max(map(below_top, users), default=-1)
        return depth[part]

    deepest = max(map(below_top, edges))
    return [[part for part in edges if depth[part] == level] for level in range(deepest, -1, -1)]


def direct(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the arrows of the picture: the imports that do not follow from a chain of other imports."""

    def reached(part: str) -> set[str]:
        return edges[part].union(*(reached(other) for other in edges[part])) if edges[part] else set()

    return [
        (part, other)
        for part, others in edges.items()
        for other in sorted(others)
        if not any(other in reached(between) for between in others - {other})
    ]


def svg() -> str:
    """Return the picture as SVG."""
    edges = imports()
    levels = floors(edges)
    width = 2 * _MARGIN + max(map(len, levels)) * (_WIDTH + _GAP) - _GAP
    height = 2 * _MARGIN + len(levels) * (_HEIGHT + _RISE) - _RISE
    corner = {
        part: (
            (width - len(level) * (_WIDTH + _GAP) + _GAP) / 2 + column * (_WIDTH + _GAP),
            height - _MARGIN - _HEIGHT - row * (_HEIGHT + _RISE),
        )
        for row, level in enumerate(levels)
        for column, part in enumerate(level)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
        "<title>Parts of lightning_normgeo; arrows point to what a part imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#8a8f98"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for part, other in direct(edges):
        (x1, y1), (x2, y2) = corner[part], corner[other]
        start, end = f"{x1 + _WIDTH / 2:g} {y1 + _HEIGHT:g}", f"{x2 + _WIDTH / 2:g} {y2 - 2:g}"
        lines.append(f'<path d="M{start} L{end}" stroke="#8a8f98" fill="none" marker-end="url(#tip)"/>')
    for part, (x, y) in corner.items():
        lines += [
            f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#eef3fb" stroke="#4c6fae"/>',
            f'<text x="{x + _WIDTH / 2:g}" y="{y + 20:g}" font-size="14" font-weight="bold" text-anchor="middle" '
            f'fill="#1b2a41">{escape(part)}</text>',
            f'<text x="{x + _WIDTH / 2:g}" y="{y + 37:g}" font-size="11" text-anchor="middle" fill="#444b57">'
            f"{escape(PARTS[part])}</text>",
        ]
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
