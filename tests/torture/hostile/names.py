"""Names that mean harm as parts of paths: of covariates, subjects, sessions, participants and prepared scans."""

import gzip
import json

import yaml
from hypothesis import strategies as st
from torture.hostile.case import CONFIG, OUTSIDE, Case, nifti
from torture.hostile.models import model

NAMES = (
    *("x/../../escaped", "../escaped", "../../../../escaped", "/tmp/escaped", f"../{OUTSIDE}/secret", "..", ".", ".hidden"),
    *("-rf", "a/b", "a\\b", "a\0b", "a\nb", "a\x1b[31m", "*", "?", "[a-z]", "**", "~", "$HOME", "{0}", "con:", "x" * 300),
    *("é" * 200, "", "x" * 5000, "\u202egpj.x", " a", "%2e%2e%2f", "a;b", "age'", '"'),
)


@st.composite
def names(draw) -> Case:
    name, reader = draw(st.sampled_from(NAMES)), draw(st.sampled_from(("explain", "labels", "compare", "key")))
    label_map = {"labels/sub-01_dseg.nii.gz": gzip.compress(nifti("single", "u1")[0])}
    if reader == "explain":
        files = dict(model())
        values = json.loads(files["model/pipeline.json"])
        values["covariates"][1]["name"] = name
        files["model/pipeline.json"] = json.dumps(values).encode()
    elif reader == "labels":
        cell = '"' + name.replace('"', '""') + '"'
        row = draw(st.sampled_from((f"01,{cell}", f"{cell},a")))
        files = {"scans.csv": f"participant_id,session_id,path\n{row},01.nii\n".encode(), **label_map}
    elif reader == "compare":
        cell, place = '"' + name.replace('"', '""') + '"', draw(st.booleans())
        header, subject = ("age", f"{cell}") if place else (cell, "sub-01")
        files = {"participants.tsv": f"participant_id\t{header}\n{subject}\t50\n".encode(), **label_map}
    else:
        cell = '"' + name.replace('"', '""') + '"'
        files = {"config.yaml": yaml.safe_dump(CONFIG).encode(), "run/prepared/scans.tsv": f"key\tage\n{cell}\t1\n".encode()}
    return Case(reader, (f"{reader} of {name[:30]!r}",), files)
