"""Memory of a run as text tables, at most ``WIDTH`` columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.core.text import size_text

WIDTH = 99

NAMES = {
    "params": "parameters",
    "optimizer": "optimizer state",
    "other_state": "other state",
    "batch": "batch",
    "prefetched_batches": "prefetched batches",
    "data": "resident data",
    "temporaries": "temporaries",
    "outputs": "outputs",
}


def memory_text(sizes: dict[str, int], remarks: dict[str, str]) -> str:
    """Format one line per part, with its share of the total and its remark."""
    total = sum(sizes.values())
    rows = [
        (NAMES[part], size_text(size), f"{100 * size / max(total, 1):.0f} %", remarks.get(part, ""))
        for part, size in sizes.items()
        if size or part in ("params", "optimizer", "temporaries")
    ]
    rows.append(("total", size_text(total), "", remarks.get("total", "")))
    return table("memory of each device", rows, "<>><")


def table(title: str, rows: Sequence[Sequence[str]], align: str) -> str:
    """Format rows under a title, aligned; shortens the last column if it is text, else the first.

    >>> print(table("sizes", [("a", "5 B"), ("bc", "12 MB")], "<>"))
    sizes
      a     5 B
      bc  12 MB
    """
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(align))]
    others = sum(width + 2 for width in widths[1:])
    last = align[-1] == "<" and len(align) > 1
    if last:
        widths[-1] = min(widths[-1], WIDTH - 2 - sum(width + 2 for width in widths[:-1]))
    else:
        widths[0] = min(widths[0], WIDTH - 2 - others)
    lines = [title]
    for row in rows:
        cells = [
            f"{_cut(text, width, end=last and i == len(align) - 1):{how}{width}}"
            for i, (text, width, how) in enumerate(zip(row, widths, align, strict=True))
        ]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int, end: bool) -> str:
    """Shorten ``text`` to ``width`` with ``…``, at its end or in its middle."""
    if len(text) <= width:
        return text
    head = width - 1 if end else width // 3
    tail = width - 1 - head
    return f"{text[:head]}…{text[len(text) - tail :]}"
