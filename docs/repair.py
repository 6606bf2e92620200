"""What the theme and its extensions leave wrong in a page's HTML, mended for readers who listen to it."""
import re

LABELS = [  # what is read aloud must contain what is written
    (re.compile(r'(<summary) aria-label="Toggle hidden content"'), r"\1"),
    (re.compile(r'(<button class="btn search-button-field [^>]*?)\s+aria-label="Search"'), r"\1"),
]
PARAMETERS = re.compile(r"<dl>\s*((?:<dd><em class=\"sig-param\">.*?</dd>\s*)+)</dl>", re.S)


def as_lines(match):
    """The parameters of a long signature: lines, and not a list of definitions without a term."""
    lines = match[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
    return f'<span class="sig-lines">{lines}</span>'


def repair(html):
    for pattern, becomes in LABELS:
        html = pattern.sub(becomes, html)
    return PARAMETERS.sub(as_lines, html)


def repair_site(site):
    """Mend every page of a folder."""
    for path in site.rglob("*.html"):
        if "_static" not in path.parts:
            html = path.read_text(encoding="utf-8")
            if (mended := repair(html)) != html:
                path.write_text(mended, encoding="utf-8")
