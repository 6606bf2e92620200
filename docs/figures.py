"""A text alternative for every figure of the book: the one that its cell gives, else one made from what surrounds it.

A cell gives it in a line at its top: `#| fig-alt: Left, ... Right, ...`."""
import ast
import re

DRAWS = re.compile(r"show_|draw|plot|contact_sheet|figure|curve|bars?$|chart|diagram|render|panel")
MARKS = {"imshow": "image", "scatter": "scatter plot", "plot": "line plot", "semilogy": "line plot",
         "semilogx": "line plot", "loglog": "line plot", "bar": "bar chart", "barh": "bar chart", "hist": "histogram",
         "matshow": "matrix", "step": "line plot", "errorbar": "line plot with error bars",
         "fill_between": "line plot with bands"}
PLAIN = [(r"^\$\$.*?\$\$", ""), (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"), (r"\{[\w:]+\}`([^`<]+?)(?: <[^>]*>)?`", r"\1"),
         (r"\\le\b", "≤"), (r"\\ge\b", "≥"), (r"\\times\b|\\cdot\b", "×"), (r"\\hat (\w)", r"\1^"),
         (r"[`*$\\]|<[^>]+>", ""), (r"\s+", " ")]


def plain(text):
    """Markdown without its markup, on one line."""
    for pattern, becomes in PLAIN:
        text = re.sub(pattern, becomes, text, flags=re.S | re.M)
    return text.strip()


def has_picture(cell):
    return any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {}))


def calls(source):
    """(name, call) of every call in a cell, in reading order; nothing where the cell is not plain Python."""
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:  # magics
        return []
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return [(getattr(node.func, "attr", getattr(node.func, "id", "")), node) for node in nodes]


def literal(node):
    """The words of a string; what an f-string fills in is an ellipsis."""
    if isinstance(node, ast.JoinedStr):
        words = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return words if re.search(r"[A-Za-z]{4}", words) else ""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def titles(found):
    """The titles that are written out in the code, each once."""
    words = [literal(k.value) for _, call in found for k in call.keywords if k.arg == "title"]
    words += [literal(call.args[0]) for name, call in found if name in ("set_title", "suptitle", "title") and call.args]
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))


def axes_labels(found):
    """"loss against step", where both axes are named in the code."""
    named = {word.arg: literal(word.value) for _, call in found for word in call.keywords}
    named |= {name[4:]: literal(call.args[0]) for name, call in found if name.startswith("set_") and call.args}
    both = named.get("xlabel") and named.get("ylabel")
    return f"{named['ylabel']} against {named['xlabel']}" if both else ""


def drawn_by(found):
    """What draws: our own function where there is one, else the kinds of matplotlib's marks."""
    own = [name for name, call in found if isinstance(call.func, ast.Name) and DRAWS.match(name)]
    if own:
        return f"drawn by {' and '.join(dict.fromkeys(own))}"
    return ", ".join(dict.fromkeys(MARKS[name] for name, _ in found if name in MARKS))


def sentence(prose, most=200):
    """The last sentence of the prose before a figure, which is where a figure is announced."""
    blocks = re.split(r"\n\s*\n", prose.strip())
    blocks = [block for block in blocks if not re.match(r"#|\||\$\$|```|<|-|:::", block.strip())] or [""]
    last = re.split(r"(?<=[.!?:])\s+(?=[A-Z\"“])", plain(blocks[-1]))[-1].rstrip(":")
    return last if len(last) <= most else last[:most].rsplit(" ", 1)[0] + " ..."


def alt_text(source, heading, prose):
    """What stands for a figure: its section, what the code or the prose calls it, and what drew it."""
    found = calls(source)
    what = "; ".join(titles(found)) or axes_labels(found) or sentence(prose)
    parts = [f"Figure in the section “{plain(heading)}”" if heading else "Figure", what, drawn_by(found)]
    return ": ".join(part for part in parts[:2] if part).rstrip(".") + (f" ({parts[2]})" if parts[2] else "")


def last_heading(text):
    """The last heading of a markdown cell, or nothing; a # inside a code fence is none."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.S | re.M)
    found = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.M)
    return found[-1] if found else ""
