"""Draws docs/architecture.svg from the imports, and writes the generated sections of docs/architecture.md.

``python docs/draw_architecture.py``, after a change of imports, of a package's docstring or of a line that the walk
names. The packages' order is that of tests/unit/test_layers.py. Nothing of hdet is imported: sources are parsed.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hdet"
LAYERS_TEST = ROOT / "tests" / "unit" / "test_layers.py"
FRONT_DOOR = "hdet"
"""What ``import hdet`` gives: ``hdet/__init__.py``, above everything that it exports."""

# ------------------------------------------------------------------------------------------------- the imports


def constant(name: str) -> Any:
    """A constant of tests/unit/test_layers.py."""
    for node in ast.parse(LAYERS_TEST.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"{LAYERS_TEST} has no {name}.")


def layers() -> list[str]:
    """Packages, and modules directly under hdet, from the lowest to the highest."""
    order: list[str] = constant("LAYERS")
    first = min(order.index(user) for user in constant("FRONT_DOOR_USERS"))
    return [*order[:first], FRONT_DOOR, *order[first:]]


ENGINE = ("settings", "ensemble", "lr_scheduler", FRONT_DOOR)
"""The layers that join the phases."""
KINDS = {
    "user": "imports of programs and adapters",
    "engine": "of what joins the phases",
    "phase": "of the phases and what they stand on",
}


def kind_of(layer: str) -> str:
    """One of :data:`KINDS`."""
    if layer in constant("FRONT_DOOR_USERS"):
        return "user"
    return "engine" if layer in ENGINE else "phase"


def source_of(layer: str) -> Path:
    """The file whose docstring says what a layer is."""
    if layer == FRONT_DOOR:
        return PACKAGE / "__init__.py"
    package = PACKAGE / layer / "__init__.py"
    return package if package.exists() else PACKAGE / f"{layer}.py"


def edges(order: list[str]) -> Counter[tuple[str, str]]:
    """``(importer, imported) -> number``: how many modules of one layer each module of the other imports, summed."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        own = FRONT_DOOR if path == PACKAGE / "__init__.py" else path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in modules_of(node):
                name = [*module.split("."), ""][1]
                other = name if name in order else FRONT_DOOR
                if other != own:
                    found.add((own, other, path, module))
    return Counter((own, other) for own, other, _, _ in found)


def modules_of(node: ast.AST) -> Iterator[str]:
    """The modules of hdet that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "hdet":
        names = [f"hdet.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module]
    else:
        names = []
    yield from (name for name in names if name.split(".")[0] == "hdet")


def description(layer: str) -> str:
    """The first sentence of a layer's docstring, in Markdown."""
    docstring = ast.get_docstring(ast.parse(source_of(layer).read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{source_of(layer)} has no docstring to describe it with. Add one.")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    paragraph = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", paragraph).replace("``", "`")
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0].rstrip(":")


# ------------------------------------------------------------------------------------------------- the diagram

ROW, BOX, LEFT, WIDE, ARCS = 52, 42, 16, 500, 330
"""In pixels: distance of rows, height of boxes, margin, width of boxes, room for arrows."""
STYLE = """\
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.page { fill: #ffffff; }
.box { fill: #f3f5f8; stroke: #8c959f; }
.name { font-size: 13px; font-weight: 600; }
.says { font-size: 10.5px; fill: #57606a; }
.phase { stroke: #0969da; fill: #0969da; } .engine { stroke: #bf5700; fill: #bf5700; }
.user { stroke: #8c959f; fill: #8c959f; }
.arrow { fill: none; stroke-opacity: 0.6; }
.head { stroke: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .page { fill: #0d1117; }
  .box { fill: #161b22; stroke: #6e7681; }
  .says { fill: #9da7b3; }
  .phase { stroke: #58a6ff; fill: #58a6ff; } .engine { stroke: #f0883e; fill: #f0883e; }
  .user { stroke: #7d8590; fill: #7d8590; }
  .arrow { fill: none; }
  .head { stroke: none; }
}"""


def draw() -> str:
    """The diagram as SVG: a box for each layer, the highest on top, and an arrow from importer to imported."""
    order = layers()
    weights = edges(order)
    rows = {layer: row for row, layer in enumerate(reversed(order))}
    width, height = LEFT + WIDE + ARCS, len(order) * ROW + 2 * LEFT + 16
    top = {layer: LEFT + row * ROW for layer, row in rows.items()}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        "<title>The packages of hdet from the highest to the lowest, and what each imports</title>",
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for own in rows:  # programs first, behind the rest
        # The arrow that goes farthest leaves at the top of the box's lower half, and arrives at the bottom of the
        # upper half: so arrows of one box do not cross one another.
        targets = sorted((other for first, other in weights if first == own), key=lambda other: -rows[other])
        for port, other in enumerate(targets):
            sources = sorted((first for first, last in weights if last == other), key=lambda first: rows[first])
            start = top[own] + BOX / 2 + (port + 1) * (BOX / 2 - 2) / (len(targets) + 1)
            end = top[other] + 2 + (len(sources) - sources.index(own)) * (BOX / 2 - 2) / (len(sources) + 1)
            distance = (rows[other] - rows[own]) / (len(order) - 1)
            lines += arrow(own, other, start, end, distance, weights[own, other], kind_of(own))
    for layer in rows:
        lines += box(layer, top[layer])
    return "\n".join([*lines, *legend(height - 14), "</svg>", ""])


def legend(y: int) -> list[str]:
    """What the colours mean."""
    lines = []
    for i, (kind, says) in enumerate(KINDS.items()):
        x = LEFT + 240 * i
        lines.append(f'<path class="{kind} arrow" stroke-width="4" d="M{x} {y - 4} h28"/>')
        lines.append(f'<text class="says" x="{x + 36}" y="{y}">{says}</text>')
    return lines


def arrow(own: str, other: str, start: float, end: float, distance: float, number: int, kind: str) -> list[str]:
    """An arc to the right of the boxes, the wider the more imports it stands for."""
    x = LEFT + WIDE
    far = x + 8 + (ARCS - 24) * 4 / 3 * distance**0.7
    stroke = 0.8 + 0.6 * number
    head = 4 + stroke
    title = f"{own} imports from {other}: {number} module{'s' if number > 1 else ''}"
    return [
        f"<g><title>{title}</title>"
        f'<path class="{kind} arrow" stroke-width="{stroke:.1f}" '
        f'd="M{x} {start:.1f} C{far:.1f} {start:.1f} {far:.1f} {end:.1f} {x + head:.1f} {end:.1f}"/>'
        f'<path class="{kind} head" d="M{x} {end:.1f} l{head + 1:.1f} {-head / 2:.1f} v{head:.1f} z"/></g>'
    ]


def box(layer: str, top: int) -> list[str]:
    """A layer's name, and what it is in two lines."""
    says = textwrap.wrap(re.sub(r"[`*]", "", description(layer)), 58, max_lines=2, placeholder=" ...")
    is_package = source_of(layer).name == "__init__.py" and layer != FRONT_DOOR
    name = {FRONT_DOOR: "hdet/__init__.py"}.get(layer, f"{layer}/" if is_package else f"{layer}.py")
    y = top + (26 if len(says) < 2 else 16)
    lines = [f'<rect class="box" x="{LEFT}" y="{top}" width="{WIDE}" height="{BOX}" rx="5"/>']
    lines.append(f'<text class="name" x="{LEFT + 8}" y="{top + 26}">{escape(name)}</text>')
    lines += [f'<text class="says" x="{LEFT + 134}" y="{y + 14 * i}">{escape(s)}</text>' for i, s in enumerate(says)]
    return lines


# ------------------------------------------------------------------------------------------------- the sections


class Step(NamedTuple):
    """One step of the walk: where ``anchor`` stands in the file, and what happens there."""

    file: str
    """Relative to the repository."""
    anchor: str
    """A part of one line that occurs in no other line of ``scope``."""
    says: str
    """In Markdown."""
    scope: str = ""
    """Where to look: a function or class by its qualified name, such as ``"Ensemble.step"``; default the file."""


FIRST_FILES: list[tuple[str, str]] = [
    ("hdet/lr_scheduler.py", "the drop-in, where a user's calls arrive"),
    ("hdet/ensemble/rounds.py", "a round, told in order: explore, converge, observe, steer"),
    ("hdet/explore/spread.py", "multipliers, and who holds which"),
    ("hdet/converge/averager.py", "how N replicas become one model"),
    ("hdet/observe/paired_probe.py", "the losses by which replicas are compared"),
    ("hdet/steer/published.py", "the smallest controller, from losses to a gain"),
]

ROUNDS = "hdet/ensemble/rounds.py"
WALK: list[Step] = [
    Step(
        "hdet/lr_scheduler.py", "ensemble.end_step(loss, batch)", "hands the loss on, before the schedule's own step."
    ),
    Step(ROUNDS, "checked = self._observe.check(loss)", "makes sure that it is one, before anything changes."),
    Step(
        "hdet/observe/training_loss.py",
        "return loss.detach().reshape(())",
        "detaches a loss that is on a device, and does not wait for it; others go on as floats.",
        scope="check_loss",
    ),
    Step(
        "hdet/observe/training_loss.py",
        "self._device.add_(loss)",
        "adds it to this replica's sum over the round, on its device; `self._host` has those that are floats.",
        scope="TrainingLoss.add",
    ),
    Step(
        ROUNDS,
        "if steps % self._course.converge_every == 0:",
        "goes on at every T-th step. In all others the walk goes on where the schedule is stepped, below.",
        scope="Rounds.end_step",
    ),
    Step(
        ROUNDS,
        "**self._observe.terms(),",
        "reads sum and number of the losses from the device, into the round's one small message.",
    ),
    Step(
        "hdet/replicas/agreement.py",
        "rows = (gather or replicas.all_gather)(",
        "sends it, with the step and a hash of all settings: every rank now has every replica's loss.",
    ),
    Step(
        "hdet/observe/round_losses.py",
        "return tuple(total / count if count else math.nan",
        "is each replica's mean loss over the round.",
    ),
    Step(
        ROUNDS,
        "return self._roll_back(watched, started, complete)",
        "undoes the round, if these losses or the weights say that it blew up; the walk then ends with a smaller gain.",
    ),
    Step(
        ROUNDS,
        "averaged = self._converge_phase.average(",
        "averages the weights. The replicas' displacements from the mean are kept for the probe, if there is one.",
    ),
    Step(
        "hdet/observe/paired_probe.py",
        "return losses_by_point(",
        "is what the probe found: every replica's losses of one batch, at five points.",
    ),
    Step(
        "hdet/steer/phase.py",
        "seen = RoundObservation(",
        "puts together what is known of the round: losses, the probe's, how far run and schedule are.",
    ),
    Step(
        "hdet/steer/controllers.py",
        "self._controller.update(",
        "asks the controller for each learning rate. From here to the gain all is plain floats.",
        scope="Controllers.update",
    ),
    Step(
        "hdet/steer/posterior.py",
        "math.exp(min(max((1 - trust) * estimate",
        "is `Posterior`, the default: how far the weights moved and the probe's slopes, against the user's own rate.",
    ),
    Step(
        "hdet/steer/published.py",
        "log_gain = math.log(state.gain)",
        "is `Published`, the paper's: the hypergradient of the training losses moves the log gain.",
    ),
    Step(ROUNDS, "self.draw()", "begins the next round with the new gain.", scope="Rounds._end_round"),
    Step(
        "hdet/explore/fan_out.py",
        "self._scales = [gain * rho for gain, rho in",
        "is what this replica multiplies the schedule by for a round: gain times its multiplier, drawn anew.",
    ),
    Step(
        "hdet/lr_scheduler.py",
        "ensemble.fan_out(rates)",
        "follows torch's own step, which has written the schedule's next learning rate into the optimizer.",
    ),
    Step(
        "hdet/explore/fan_out.py",
        'group["lr"] = lr * scales[i]',
        "writes this replica's learning rate over it.",
    ),
]


def line_of(step: Step) -> int:
    """The line where a step's anchor stands.

    Raises:
        ValueError: if file, scope or anchor is not there, or the anchor is there more than once.
    """
    path = ROOT / step.file
    text = path.read_text(encoding="utf-8")
    first, last = 1, len(text.splitlines())
    if step.scope:
        found = [node for name, node in definitions(ast.parse(text)) if name == step.scope]
        if len(found) != 1:
            raise ValueError(f"{step.file} has {len(found)} definitions of {step.scope}. Must have one: mend WALK.")
        first, last = found[0].lineno, found[0].end_lineno or last
    lines = [i for i, line in enumerate(text.splitlines(), 1) if first <= i <= last and step.anchor in line]
    if len(lines) != 1:
        where = f"{step.file}{' in ' + step.scope if step.scope else ''}"
        raise ValueError(f"{step.anchor!r} is in {len(lines)} lines of {where}. Must be in one: mend WALK.")
    return lines[0]


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Functions and classes by qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")


def packages() -> str:
    """A table of the layers, the highest first."""
    rows = [f"| {link(source_of(layer))} | {description(layer).replace('|', chr(92) + '|')} |" for layer in layers()]
    return "\n".join(["| Layer | What it is |", "|---|---|", *reversed(rows)])


def first_files() -> str:
    """The files to read first."""
    rows = [f"{i}. {link(ROOT / file)}: {says}" for i, (file, says) in enumerate(FIRST_FILES, 1)]
    return "\n".join(rows)


def walk() -> str:
    """The steps, each with its line."""
    steps = []
    for i, step in enumerate(WALK, 1):
        line = line_of(step)
        tree = ast.parse((ROOT / step.file).read_text(encoding="utf-8"))
        around = [name for name, node in definitions(tree) if node.lineno <= line <= (node.end_lineno or line)]
        steps.append(f"{i}. [`{step.file}:{line}`](../{step.file}#L{line}), `{around[-1]}`, {step.says}")
    return "\n".join(steps)


def link(path: Path) -> str:
    """To a file of the repository, from docs/."""
    path.stat()  # or an error that names it
    name = path.relative_to(ROOT).as_posix()
    shown = name.removesuffix("__init__.py") if path.parent != PACKAGE else name
    return f"[{shown}](../{name})"


SECTIONS = {"packages": packages, "first files": first_files, "walk": walk}


def written(document: str) -> str:
    """docs/architecture.md with its generated sections as they are now."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}: written by draw_architecture.py -->\n\n", f"\n\n<!-- end of {name} -->"
        before, found, rest = document.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"docs/architecture.md has no section {begin.strip()} ... {end.strip()}.")
        document = f"{before}{begin}{section()}{end}{after}"
    return document


def main() -> None:
    """Write both files."""
    page = ROOT / "docs" / "architecture.md"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "architecture.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
