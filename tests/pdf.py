"""PDF files of plain text, written by hand: for tests, and for the one among the examples.

`python -m tests.pdf` writes examples/harbour/rules.pdf again.
"""

from __future__ import annotations

from pathlib import Path

RULES = (
    """Rules of the harbour of Sandwick Haven

1. Speed. No boat makes more than four knots between the pier heads.
2. Berths. Visitors lie on pontoon C. Pontoons A and B are for boats
of the haven. Rafting up is allowed, three boats at most.
3. Quiet. Halyards are tied off at night. Generators are silent from
ten in the evening to seven in the morning.""",
    """4. Waste. Used oil goes into the green tank behind the fuel berth.
Nothing is thrown into the basin, not even fish heads: they draw gulls.
5. Fire. Nobody grills on board. There are two places for it on the
South Pier, with sand and a bucket.
6. Dogs. Dogs are welcome on a lead. They are not allowed on pontoon A,
where the otters live.
7. Swimming. Swimming is allowed at the slipway, not in the fairway.""",
)


def pdf(pages: tuple[str, ...], title: str = "") -> bytes:
    """A document with these pages (ASCII), in Helvetica."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for n, page in enumerate(pages):
        lines = "".join(f"({_escaped(line)}) Tj T*\n" for line in page.splitlines())
        stream = f"BT /F1 12 Tf 60 780 Td 18 TL\n{lines}ET"
        about = "/Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >>"
        objects += [f"<< {about} /Contents {5 + 2 * n} 0 R >>"]
        objects += [f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream"]
    objects += [f"<< /Title ({_escaped(title)}) >>"]
    return _file(objects)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


def _file(objects: list[str]) -> bytes:
    body, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{one}\nendobj\n".encode("ascii")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{trailer}".encode("ascii")


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "examples/harbour/rules.pdf"
    target.write_bytes(pdf(RULES, "Rules of the harbour"))
    print(target)
