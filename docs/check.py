"""Check a built site without a browser: `python docs/check.py FOLDER` prints what is wrong and fails if anything is.

Three things: every local link leads to a file and every #fragment to an id; nothing is fetched from another host
(a plain <a href> may lead anywhere); every picture has a text alternative that says more than its file's name."""
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"src", "srcset", "poster", "data", "background", "xlink:href"}  # what a browser loads by itself
CSS_URL = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
JS_URL = re.compile(r"""(?:fetch|import|importScripts|Worker|EventSource|WebSocket)\s*\(\s*["'`]((?:\w+:)?//[^"'`]+)
                        |(?:from|\.src\s*=|\.href\s*=)\s*["'`]((?:\w+:)?//[^"'`]+)""", re.X)


@dataclass
class Page(HTMLParser):
    """What the checker wants to know of one HTML file."""
    ids: set = field(default_factory=set)
    links: list = field(default_factory=list)  # (line, address) that must be there if it is local
    fetched: list = field(default_factory=list)  # (line, address) that must be local, and there
    faults: list = field(default_factory=list)  # (line, sentence)
    inside: str = ""  # "style" or "script" while in one

    def __post_init__(self):
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag, attrs):
        line, attrs = self.getpos()[0], {name: value or "" for name, value in attrs}
        self.ids.update(attrs[name] for name in ("id", "name") if name in attrs)
        loads = tag in ("link", "use", "image", "feImage")
        if loads and attrs.get("rel") == "canonical":
            return
        for name in attrs.keys() & {"href", "action", *FETCHED}:
            addresses = re.findall(r"(?:^|,\s)\s*(\S+)", attrs[name]) if name == "srcset" else [attrs[name].strip()]
            kind = self.fetched if name in FETCHED or (name == "href" and loads) else self.links
            kind += [(line, address) for address in addresses]
        self.fetched += [(line, address) for address in css_addresses(attrs.get("style", ""))]
        if tag == "img":
            self.look_at_alt(line, attrs)
        if tag in ("style", "script"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data):
        if self.inside:
            find = css_addresses if self.inside == "style" else js_addresses
            self.fetched += [(self.getpos()[0], address) for address in find(data)]

    def look_at_alt(self, line, attrs):
        """`alt=""` marks decoration, and is allowed only beside role or aria-hidden; a file's name says nothing."""
        alt, decoration = attrs.get("alt", "").strip(), attrs.get("role") == "presentation" or "aria-hidden" in attrs
        if not alt and not decoration:
            self.faults.append((line, f"the picture {attrs.get('src', '')[:60]} has no alt text"))
        elif alt and alt in (attrs.get("src"), Path(attrs.get("src", "")).name):
            self.faults.append((line, f"the alt text of {alt[:60]} is its file name"))


def css_addresses(text):
    """What a style sheet loads."""
    return [(a or b).strip() for a, b in CSS_URL.findall(text)]


def js_addresses(text):
    """What a script plainly fetches from another host; the browser tests see the rest."""
    return [a or b for a, b in JS_URL.findall(text)]


def is_outside(address):
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp", "ws", "wss", "file")


def read_page(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def resolve(site, path, address):
    """The file that a local address means, and its fragment; no file for data:, mailto: and the like."""
    parts = urlsplit(address)
    if parts.scheme:
        return None, ""
    start = site if parts.path.startswith("/") else path.parent
    target = (start / unquote(parts.path).lstrip("/") if parts.path else path).resolve()
    return (target / "index.html" if target.is_dir() else target), unquote(parts.fragment)


def check_address(site, path, address, pages):
    """A sentence on what is wrong with a local address, or None."""
    target, fragment = resolve(site, path, address)
    if target is None or not address.strip("#"):
        return None
    if not target.is_relative_to(site):
        return f"{address} leads out of the site"
    if not target.is_file():
        return f"{address} leads to no file"
    if fragment and target in pages and fragment not in pages[target].ids:
        return f"{address} leads to no such id in {target.relative_to(site)}"


def check_site(site):
    """All faults of a folder, each as `file:line: sentence`."""
    site = Path(site).resolve()
    pages = {path: read_page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    if not pages:
        return [f"{site}: no pages; build them with `make docs`"]
    faults = []
    for path, page in pages.items():
        found = list(page.faults)
        found += [(line, f"{url} is fetched from elsewhere") for line, url in page.fetched if is_outside(url)]
        local = [pair for pair in page.links + page.fetched if not is_outside(pair[1])]
        found += [(line, fault) for line, address in local if (fault := check_address(site, path, address, pages))]
        faults += [f"{path.relative_to(site)}:{line}: {fault}" for line, fault in sorted(set(found))]
    return faults + check_styles(site)


def check_styles(site):
    """The style sheets: nothing from elsewhere, and every file that they name is there."""
    faults = []
    for path in sorted(site.rglob("*.css")):
        for address in css_addresses(path.read_text(encoding="utf-8")):
            outside = is_outside(address)
            fault = f"{address} is fetched from elsewhere" if outside else check_address(site, path, address, {})
            faults += [f"{path.relative_to(site)}: {fault}"] if fault else []
    return faults


def main():
    faults = check_site(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "_build" / "html")
    print("\n".join(faults) or "docs: every link leads somewhere, nothing is fetched, every picture has its text")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
