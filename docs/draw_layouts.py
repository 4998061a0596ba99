"""Draw the weight layouts, the decode kernel's lanes and a decode step's launches as SVG in docs/images.

``python docs/draw_layouts.py`` writes them, ``--check`` compares. Where a code lies is not typed here: a matrix with
one code set is packed, and the bits that come out set are looked at.
"""

from __future__ import annotations

import argparse
import sys
from html import escape
from pathlib import Path

import torch

from gemq import format as fmt
from gemq import reference

IMAGES = Path(__file__).parent / "images"
BITS, COLUMNS, GROUP = 2, 256, 64
CELL, HIGH = 24, 26


def positions(layout: str) -> dict[int, int]:
    """The column whose code a bit of the buffer belongs to, by bit, for row 0 of a matrix of :data:`COLUMNS`."""
    meta, found = torch.zeros(1, COLUMNS // GROUP, 2, dtype=torch.float16), {}
    for column in range(COLUMNS):
        codes = torch.zeros(1, COLUMNS, dtype=torch.uint8)
        codes[0, column] = 2**BITS - 1
        packed = reference.pack(codes, BITS).flatten()
        if layout != "canonical":
            packed, _ = reference.to_layout(packed.view(1, -1), meta, BITS, COLUMNS, GROUP, layout)
        data = packed.flatten().view(torch.uint8)
        for byte in torch.where(data)[0].tolist():
            found |= {8 * byte + bit: column for bit in range(8) if int(data[byte]) >> bit & 1}
    return found


class Drawing:
    """Marks of one SVG."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title, self.marks = width, height, title, []

    def text(
        self, x: float, y: float, text: str, size: int = 13, anchor: str = "start", weight: str = "normal"
    ) -> None:
        """Write a line whose baseline begins (or ends, or is centred) at a point."""
        self.marks.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
                          f'font-weight="{weight}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, fill: str = "#ffffff", label: str = "") -> None:
        """Draw a rectangle with a label in its middle."""
        self.marks.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
                          f'stroke="#555555"/>')
        if label:
            self.text(x + width / 2, y + height / 2 + 4, label, 11, "middle")

    def arrow(self, x: float, y: float, length: float) -> None:
        """Draw an arrow to the right."""
        end = x + length
        line, head = f"M{x:g} {y:g}H{end - 6:g}", f"M{end:g} {y:g}l-8 -4v8z"
        self.marks.append(f'<path d="{line}{head}" stroke="#555555" fill="#555555"/>')

    def svg(self) -> str:
        """The file."""
        marks = "\n".join(self.marks)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
                f'font-family="sans-serif" fill="#222222"><title>{escape(self.title)}</title>\n'
                f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>\n{marks}\n</svg>\n')


def shade(column: int) -> str:
    """A colour for a column: neighbours are alike."""
    return f"hsl({column * 300 // COLUMNS}, 70%, 84%)"


def _codes(d: Drawing, x: int, y: int, where: dict[int, int], bits: list[int]) -> None:
    """Draw the codes that begin at these bits of a buffer, the first at the right, as numbers are written."""
    for place, bit in enumerate(reversed(bits)):
        column = where[bit]
        d.box(x + place * CELL, y, CELL, HIGH, shade(column), str(column))


def layouts() -> str:
    """The three layouts of a row of 2-bit codes."""
    d = Drawing(760, 470, "Where the codes of a row of 2 bits lie in the three layouts")
    d.text(16, 28, "Where the codes of row 0 lie, 2 bits each: numbers are columns, the lowest bit is on the right", 15,
           weight="bold")
    where = positions("canonical")
    d.text(16, 62, "canonical: on disk. A row is one dense stream of codes, little-endian.")
    for byte in range(4):
        x = 16 + byte * (4 * CELL + 16)
        _codes(d, x, 72, where, [8 * byte + BITS * f for f in range(4)])
        d.text(x + 2 * CELL, 116, f"byte {byte}", 11, "middle")
    where = positions("cpu_tile")
    d.text(16, 156, f"cpu_tile: {fmt.CPU_ROWS} rows side by side. Byte 4 row + j of a 64-byte vector; below, the four "
                    "bytes of row 0 in two vectors.")
    for vector in range(2):
        for j in range(4):
            x = 16 + j * (4 * CELL + 16)
            y = 166 + vector * 62
            _codes(d, x, y, where, [8 * (64 * vector + j) + BITS * f for f in range(4)])
            d.text(x + 2 * CELL, y + 44, f"vector {vector}, byte {j}", 11, "middle")
    where, words = positions("gpu_tile"), fmt.gpu_kw(COLUMNS, BITS)
    d.text(16, 306, f"gpu_tile: {fmt.GPU_ROWS} rows a tile, {words} int32 a row and span. Each half of a word has a")
    d.text(16, 324, "field of every block of columns: one AND leaves a float16 subnormal. Below, two words of row 0.")
    for word in range(2):
        for half in range(2):
            x, y = 16 + (1 - half) * (8 * CELL + 24), 336 + word * 62
            _codes(d, x, y, where, [32 * word + 16 * half + BITS * f for f in range(8)])
            d.text(x + 4 * CELL, y + 44, f"word {word}, {('low', 'high')[half]} half", 11, "middle")
    return d.svg()


def lanes() -> str:
    """The rows and words that the threads of a warp hold in the decode kernel."""
    d = Drawing(880, 400, "Rows and words that the threads of a warp hold in the decode kernel")
    title = "A warp and a span: lane 4 r + c holds row r of every eight, words 4 c to 4 c + 3 (16 bytes a load)"
    d.text(16, 28, title, 15, weight="bold")
    size, left, top = 26, 74, 70
    for word in range(16):
        d.text(left + word * (size + 22) + 24, top - 10, f"w{word}", 11, "middle")
    for row in range(8):
        d.text(left - 12, top + row * 32 + 17, f"row {row}", 11, "end")
        for c in range(4):
            lane = 4 * row + c
            x = left + 4 * c * (size + 22)
            d.box(x, top + row * 32, 4 * (size + 22) - 6, size, f"hsl({c * 80 + 20}, 70%, {88 - row}%)", f"lane {lane}")
    end = top + 8 * 32
    d.text(16, end + 24, "Rows 8 to 15, 16 to 23 .. of the tile follow in the next registers of the same lanes.")
    d.text(16, end + 46, "The tensor core takes codes in this order, and activations in the same order of columns,")
    d.text(16, end + 64, "so matrices are made by renaming registers.")
    return d.svg()


def launches() -> str:
    """The three launches of a block of experts when tokens are decoded."""
    d = Drawing(880, 250, "The launches of a block of experts in a decode step")
    d.text(16, 28, "A block of experts in a decode step (1 to 16 tokens): three launches", 15, weight="bold")
    boxes = (
        ("prepare", ("blocks of pairs that share an expert", "activations: power of two a group",
                     "sum a group, counters 0")),
        ("gate_up", ("one program a tile and block", "codes x activations, gate and up",
                     "SiLU(gate) * up, normalised")),
        ("product", ("down projection", "last program of a tile sums", "slots and splits, in fixed order")),
    )
    for at, (name, lines) in enumerate(boxes):
        x = 16 + at * 292
        d.box(x, 60, 252, 120, f"hsl({at * 60 + 190}, 60%, 92%)")
        d.text(x + 126, 86, name, 15, "middle", "bold")
        for n, line in enumerate(lines):
            d.text(x + 126, 112 + 22 * n, line, 12, "middle")
        if at < 2:
            d.arrow(x + 254, 120, 36)
    d.text(16, 214, "In: x [T, H], ids and weights [T, k] of the router, packed stacks. Out: [T, H]. The host has no")
    d.text(16, 232, "part in it: a step is captured in one CUDA graph. A dense matrix takes two: prepare and product.")
    return d.svg()


DRAWINGS = {"layouts.svg": layouts, "lanes.svg": lanes, "decode-launches.svg": launches}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check, stale = parser.parse_args().check, []
    for name, draw in DRAWINGS.items():
        path, text = IMAGES / name, draw()
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    print(f"stale: {', '.join(stale)}" if stale else "as drawn")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
