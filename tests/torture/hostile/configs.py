"""Hostile configs: values of the wrong kind, and YAML that means harm."""

import yaml
from hypothesis import strategies as st
from torture.hostile.case import CONFIG, INF, NAN, Case, changed, damaged

VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        2.5,
        10**30,
        -(10**30),
        NAN,
        INF,
        1e300,
        "",
        "x",
        "1",
        "1e3",
        "yes",
        "../..",
        "\0",
        "\x1b[2J",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"a": {}},
        ["x"] * 3,
        [1, 2],
        [1, 2, 3],
        [0, 0, 0],
        [2**20] * 3,
        [True] * 3,
        {"kind": "monai"},
        {1: 2},
    ),
    *("x" * 10**4, list(range(3000)), [{"name": "age", "kind": "continuous"}] * 2),
)


def _laughs(width: int = 10, depth: int = 10) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def _merges(depth: int = 25) -> str:
    return "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, depth))


SNIPPETS = (
    *(
        _laughs(),
        _merges(),
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "seed: 1\nseed: 2\n",
        "[" * 5000,
        "{" * 5000,
        "a: " + "[" * 3000 + "]" * 3000,
    ),
    *(
        "- " * 3000,
        "a: !!python/object/apply:os.system ['touch executed']\n",
        "a: !!bool 7\n",
        "a: !!int x\n",
        "a: !!timestamp x\n",
    ),
    *(
        "a: 2024-99-99\n",
        "a: " + "9" * 5000 + "\n",
        "a: 0b\n",
        "a: 0x" + "f" * 5000 + "\n",
        "a: =\n",
        "? [a]\n: b\n",
        "? {a: b}\n: c\n",
    ),
    *(
        "a: !!binary x\n",
        "a: !!set {x, y}\n",
        "a: !!omap [x]\n",
        "---\na: 1\n---\nb: 2\n",
        "%YAML 9.9\n---\na: 1\n",
        "a: \x07\n",
        "x" * 70_000,
    ),
    *(
        "a: *nobody\n",
        'a: "\\0"\n',
        'a: "\\ud800"\n',
        "1: 2\n",
        "null: 1\n",
        "[a, b]: 1\n",
        "\ttab: 1\n",
        "a: 1:99:99\n",
        "a: |\n  x\n b\n",
    ),
)


@st.composite
def configs(draw) -> Case:
    values, mutations = CONFIG, []
    for _ in range(draw(st.integers(0, 2))):
        values, what = draw(changed(values, VALUES))
        mutations.append(what)
    text = yaml.safe_dump(values, default_flow_style=draw(st.sampled_from((None, False, True))))
    if draw(st.booleans()):
        snippet = draw(st.sampled_from(SNIPPETS))
        text = draw(st.sampled_from((snippet, text + snippet, snippet + text)))
        mutations.append(snippet[:30])
    content = text.encode("utf-8", "replace")
    if draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content))
        mutations.append("bytes")
    return Case("config", tuple(mutations), {"config.yaml": content})
