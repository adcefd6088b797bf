"""Hostile tables and BIDS folders: cells, paths, encodings and links."""

import json

from hypothesis import strategies as st
from torture.hostile.case import OUTSIDE, TABLE, TABLE_OF_PARTICIPANTS, Case, Link, damaged

CELLS = (
    *(
        "=1+1",
        "@SUM(A1)",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "'=1",
        "\t=1",
        "n/a",
        "",
        " ",
        "1e999",
        "nan",
        "-inf",
        "1_000",
        "0x10",
    ),
    *(
        "١٢",
        "½",
        "F",
        "f",
        "X",
        "1;2",
        '"',
        '""',
        "'",
        "a\nb",
        "a\rb",
        "\0",
        "\x1b[31m",
        "\ud7ff",
        "\u202e",
        "é" * 300,
        "x" * 10**5,
    ),
    *(
        "89+",
        ">",
        "+",
        "35-40",
        "40-35",
        "26,9",
        "1,234",
        "1" * 50 + "-" + "2" * 50,
        "1" * 10**4 + "+",
        "-9999",
        "999",
        "1e308",
    ),
    *("none", "female", "2", "001", "sub-1", "ses-00a", "0" * 1000, "="),
    *("sub-", "sub-sub-01", "../01", "a/b", "-1", "1,5", "1.0", "True", "%s%n", "{0}", "${HOME}", "~"),
)
PATHS = (
    *(
        "../outside/secret.nii.gz",
        "/etc/passwd",
        "x/../../outside/secret.nii.gz",
        "link/secret.nii.gz",
        "secret.nii.gz",
        "~/x.nii",
    ),
    *(
        "./01a.nii.gz",
        "a//b.nii",
        ".",
        "..",
        "/",
        "file:///etc/passwd",
        "https://example.org/x.nii",
        "//host/share",
        "a\\b.nii",
    ),
    *("x" * 5000, "a/" * 3000 + "b.nii", "pair.hdr", "con.nii", "01a.nii.gz\0.txt", "loop/x.nii"),
)
ROWS_A_SESSION = "participant_id\tsession_id\tage\tsex\nsub-01\tses-a\t50\tF\n1\tb\t51\tn/a\nsub-02\ta\t89+\tmale\n"
LINKS = {
    "link": Link(f"../{OUTSIDE}"),
    "secret.nii.gz": Link(f"../{OUTSIDE}/secret.nii.gz"),
    "pair.img": Link(f"../{OUTSIDE}/secret.nii.gz"),
    "pair.hdr": b"",
    "loop": Link("."),
}


@st.composite
def tables(draw, text: str = TABLE, separator: str = ",") -> tuple[bytes, tuple[str, ...]]:
    """A table and what was done to it."""
    rows, mutations = [line.split(separator) for line in text.splitlines()], []
    for _ in range(draw(st.integers(0, 3))):
        i, j = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows[0]) - 1))
        what = draw(
            st.sampled_from(("cell", "cell", "path", "header", "row twice", "row gone", "cell more", "cell less", "column"))
        )
        if what == "cell":
            rows[i][j : j + 1] = [draw(st.sampled_from(CELLS))]
        elif what == "path" and "path" in rows[0]:
            rows[max(i, 1) % len(rows)][2:3] = [draw(st.sampled_from(PATHS))]
        elif what == "header":
            rows[0][j : j + 1] = [
                draw(st.sampled_from(("", "age", "Age", "participant_id", "path", "AGE ", "x" * 10**5, "=1")))
            ]
        elif what == "row twice":
            rows.insert(i, list(rows[i]))
        elif what == "row gone" and len(rows) > 1:
            del rows[i]
        elif what == "cell more":
            rows[i].append(draw(st.sampled_from(CELLS)))
        elif what == "cell less":
            rows[i] = rows[i][:-1]
        elif what == "column":
            rows = [[*row, "x" * k] for k, row in enumerate(rows)]
        mutations.append(what)
    form = draw(
        st.sampled_from(
            ("", "", "quoted", "semicolons", "BOM", "CRLF", "CR", "UTF-16", "Latin-1", "unclosed", "wide", "long", "empty")
        )
    )
    if form == "quoted":
        rows = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    elif form == "wide":
        rows = [[*row, *(f"{i}" for i in range(5000))] for row in rows]
    elif form == "long":
        rows += [[f"s{i}", *row[1:2], f"{i}.nii", *row[3:]] for i in range(3000) for row in rows[1:2]]
    text = "\n".join((";" if form == "semicolons" else separator).join(row) for row in rows) + "\n"
    if form in ("CRLF", "CR"):
        text = text.replace("\n", "\r\n" if form == "CRLF" else "\r")
    elif form == "unclosed":
        text = text[: len(text) // 2] + '"' + text[len(text) // 2 :]
    elif form == "empty":
        text = draw(st.sampled_from(("", "\n", "\n\n\n", ",", "participant_id", "\ufeff", "\0")))
    encoding = {"BOM": "utf-8-sig", "UTF-16": "utf-16", "Latin-1": "latin-1"}.get(form, "utf-8")
    content = text.encode(encoding, "replace")
    if draw(st.integers(0, 3)) == 0:
        content = draw(damaged(content))
        mutations.append("bytes")
    return content, (*mutations, *[form][: bool(form)])


def bids_files(participants: bytes | str | Link) -> dict[str, bytes | Link]:
    empty = {f"sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_T1w.nii.gz": b"" for s, v in (("01", "a"), ("01", "b"), ("02", "a"))}
    description = {"Name": "test", "BIDSVersion": "1.10.0"}
    participants = participants.encode() if isinstance(participants, str) else participants
    return {"dataset_description.json": json.dumps(description).encode(), "participants.tsv": participants, **empty}


@st.composite
def tabular(draw) -> Case:
    reader = draw(st.sampled_from(("table", "table", "table", "requests", "BIDS")))
    if reader == "table":
        content, mutations = draw(tables())
        return Case(reader, mutations, {"scans.csv": content, **LINKS})
    if reader == "requests":
        content, mutations = draw(tables("age,sex\n50,F\n60.5,M\n,\n"))
        return Case(reader, mutations, {"scans.csv": content})
    content, mutations = draw(tables(TABLE_OF_PARTICIPANTS, "\t"))
    files = bids_files(content)
    what = draw(st.sampled_from(BIDS_TRICKS))
    if what == "sessions":
        content, more = draw(tables("session_id\tage\nses-a\t61\nses-b\t64\n", "\t"))
        files["sub-01/sub-01_sessions.tsv"], mutations = content, (*mutations, *more)
    elif what == "rows a session":
        content, mutations = draw(tables(ROWS_A_SESSION, "\t"))
        files["participants.tsv"] = content
    elif what == "none":
        del files["participants.tsv"]
    elif what == "description":
        files["dataset_description.json"] = draw(st.sampled_from((b"", b"{", b"[]", b"[" * 10**5, b'{"Name": NaN}', b"\xff")))
    elif what == "layout":
        files["layout_config.json"] = b'{"name": "x", "entities": [{"name": "subject", "pattern": "(a+)+$"}]}'
    elif what:
        files |= BIDS_LINKS[what]
    return Case(reader, (*mutations, *[what][: bool(what)]), files)


BIDS_LINKS = {
    "participants out": {"participants.tsv": Link(f"../{OUTSIDE}/secret.tsv")},
    "sessions out": {"sub-01/sub-01_sessions.tsv": Link(f"../../{OUTSIDE}/secret.tsv")},
    "description out": {"dataset_description.json": Link(f"../{OUTSIDE}/secret.tsv")},
    "folder out": {"sub-03": Link(f"../{OUTSIDE}")},
    "loops": {"sub-01/up": Link(".."), "sub-02/up": Link("..")},
    "link to nothing": {"sub-03/anat/sub-03_T1w.nii.gz": Link("nowhere")},
    "annexed": {
        "sub-03/anat/sub-03_T1w.nii.gz": Link("../../.git/annex/objects/x.nii.gz"),
        ".git/annex/objects/x.nii.gz": b"",
    },
}
BIDS_TRICKS = ("", "", "sessions", "sessions", "rows a session", "none", "description", "layout", *sorted(BIDS_LINKS))
