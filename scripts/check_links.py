"""Every relative link of the project's Markdown leads somewhere, anchors included. Exit 1 names those that do not."""

import re
import subprocess
import sys
from pathlib import Path

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def broken_links(root: Path) -> list[str]:
    """`file:line: link` of every relative link below `root` without a target."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = []
    for name in listed.stdout.split():
        page = root / name
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            for match in _LINK.finditer(line):
                link = match[1] or match[2]
                if not re.match(r"[a-z]+:", link) and not _leads_somewhere(page, link):
                    found.append(f"{name}:{number}: {link}")
    return found


def _leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page if not path else page.parent / path
    if not target.exists():
        return False
    return not anchor or (target.suffix == ".md" and anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in _HEADING.findall(text)}


if __name__ == "__main__":
    broken = broken_links(Path(__file__).resolve().parent.parent)
    print("\n".join(broken) if broken else "all links lead somewhere")
    sys.exit(bool(broken))
