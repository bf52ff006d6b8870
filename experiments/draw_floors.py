"""Draw the rooms (subpackages and top-level modules) of ``focuslens`` on their floors in ``docs/floors.svg``.

    python experiments/draw_floors.py

A floor is a level of imports: a room imports only rooms on lower floors. An arrow leads from a room to a room that it
imports. An arrow that follows from two or more other arrows is left out. An arrow that leads upward or sideways is red
and dashed. The package has no such arrow, because ``make lint`` rejects these imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "floors.svg"

FLOORS = (
    *(("cli",), ("studies",), ("viz",)),
    *(("evaluation", "directions"), ("scores", "interventions")),
    *(("model",), ("data", "hooks"), ("prompts", "heads"), ("util",)),
)
"""Rooms of each floor from left to right, from the top floor to the bottom floor."""

_WIDTH, _FLOOR, _ROOM, _GAP = 760, 84, (150, 40), 140
_STYLE = """
  text { font: 15px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; text-anchor: middle; }
  .floor { fill: #f4f5f7; } .number { fill: #7a7f87; font-size: 13px; }
  .room { fill: #ffffff; stroke: #3f51b5; stroke-width: 1.5; }
  .arrow { stroke: #55595f; stroke-width: 1.5; fill: none; marker-end: url(#head); }
  .upward { stroke: #b00020; stroke-dasharray: 6 4; }
"""


def rooms(package: Path) -> set[str]:
    """Names of the subpackages and modules directly in the package, except ``__init__`` and ``__main__``."""
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    return modules | {path.parent.name for path in package.glob("*/__init__.py")}


def imports(package: Path) -> set[tuple[str, str]]:
    """Pairs (importing room, imported room), including imports inside functions and under ``TYPE_CHECKING``."""
    names = rooms(package)
    found: set[tuple[str, str]] = set()
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for module in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            top, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            if room in names and top == package.name and target in names - {room}:
                found.add((room, target))
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    """Full names of the modules and objects that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def without_implied(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Transitive reduction of downward arrows: arrows that follow from other arrows are removed."""
    below: dict[str, set[str]] = {}

    def reached(room: str) -> set[str]:
        if room not in below:
            targets = {target for source, target in arrows if source == room}
            below[room] = targets.union(*(reached(target) for target in targets))
        return below[room]

    def implied(source: str, target: str) -> bool:
        return any(target in reached(between) for start, between in arrows if start == source)

    return {(source, target) for source, target in arrows if not implied(source, target)}


def places(floors: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Coordinates of the centre of every room."""
    return {
        room: ((2 * place + 1 - len(names)) * (_ROOM[0] + _GAP) // 2 + _WIDTH // 2, floor * _FLOOR + _FLOOR // 2)
        for floor, names in enumerate(floors)
        for place, room in enumerate(names)
    }


def svg(package: Path, floors: Sequence[Sequence[str]] = FLOORS) -> str:
    """Picture of the rooms and arrows as SVG text.

    Raises:
        ValueError: If a room has no floor, or a floor has a room that does not exist.
    """
    centres, existing = places(floors), rooms(package)
    if existing != set(centres):
        raise ValueError(f"rooms and FLOORS differ in {', '.join(sorted(existing ^ set(centres)))}; change FLOORS")
    arrows = imports(package)
    downward = {(source, target) for source, target in arrows if centres[source][1] < centres[target][1]}
    height = len(floors) * _FLOOR
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<title>The rooms of focuslens on their floors; an arrow leads from a room to a room that it imports</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#55595f"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        *(_floor(index, len(floors)) for index in range(len(floors))),
        *(_arrow(centres, arrow, "arrow") for arrow in sorted(without_implied(downward))),
        *(_arrow(centres, arrow, "arrow upward") for arrow in sorted(arrows - downward)),
        *(_room(room, centre) for room, centre in centres.items()),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _floor(index: int, count: int) -> str:
    top = index * _FLOOR + 4
    number = f'<text class="number" x="28" y="{top + _FLOOR // 2}">{count - index}</text>'
    return f'<rect class="floor" x="8" y="{top}" width="{_WIDTH - 16}" height="{_FLOOR - 8}" rx="6"/>{number}'


def _arrow(centres: Mapping[str, tuple[int, int]], arrow: tuple[str, str], kind: str) -> str:
    (x1, y1), (x2, y2) = (centres[room] for room in arrow)
    side, aside = _ROOM[1] // 2 * ((y2 > y1) - (y2 < y1)), 45 * ((x2 > x1) - (x2 < x1))
    return f'<path class="{kind}" d="M{x1 + aside} {y1 + side} L{x2} {y2 - side}"/>'


def _room(room: str, centre: tuple[int, int]) -> str:
    x, y = centre
    box = f'x="{x - _ROOM[0] // 2}" y="{y - _ROOM[1] // 2}" width="{_ROOM[0]}" height="{_ROOM[1]}" rx="5"'
    return f'<rect class="room" {box}/><text x="{x}" y="{y + 5}">{room}</text>'


if __name__ == "__main__":
    PICTURE.write_text(svg(ROOT / "focuslens"), encoding="utf-8")
