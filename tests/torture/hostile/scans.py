"""Hostile scans: headers, types, compression and links that no scanner wrote."""

import functools
import gzip
from dataclasses import replace

import nibabel
import numpy as np
import yaml
from hypothesis import strategies as st
from torture.hostile.case import CONFIG, INF, NAN, OUTSIDE, TABLE_OF_ONE, Case, Link, nifti, with_bytes_damaged

FIELDS = {
    "dim": (
        [4, 8, 9, 10, 1, 1, 1, 1],  # one frame
        [4, 8, 9, 10, 3, 1, 1, 1],
        [3, 32767, 32767, 32767, 1, 1, 1, 1],
        [3, 900, 900, 900, 1, 1, 1, 1],
        [3, -8, 9, 10, 1, 1, 1, 1],
        [3, 0, 9, 10, 1, 1, 1, 1],
        [2, 8, 9, 1, 1, 1, 1, 1],
        [0] * 8,
        [7, 8, 9, 10, 1, 1, 1, 1],
        [-3, 8, 9, 10, 1, 1, 1, 1],
        [300, 8, 9, 10, 1, 1, 1, 1],
        [3, 720, 1, 1, 1, 1, 1, 1],
        [3, 1, 1, 720, 1, 1, 1, 1],
    ),
    "pixdim": ([1, -2, 2, 2], [1, 0, 2, 2], [1, NAN, 2, 2], [1, INF, 2, 2], [1, 1e-30, 2, 2], [NAN, 2, 2, 2], [1, 1e30, 2, 2]),
    "srow_x": (
        [0, 0, 0, 0],
        [NAN, 0, 0, 0],
        [1e38, 0, 0, 0],
        [0, 2, 0, 0],
        [2, 0, 0, INF],
        [1e-30, 0, 0, 0],
        [0.011, 0, 0, 0],
    ),
    "srow_z": ([0, 0, 0, 0], [2, 0, 0, 0], [0, 0, -INF, 0], [0, 1e-3, 99, 0]),
    "quatern_b": (2.0, NAN, INF, -1.0, 0.7),
    "sform_code": (0, -1, 1, 99),
    "qform_code": (0, 1, -1, 99),
    "scl_slope": (0.0, NAN, INF, -1.0, 1e38, 1e-45),
    "scl_inter": (NAN, INF, -1e38, 7.0),
    "datatype": (0, 1, 2, 4, 8, 16, 32, 64, 77, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1),
    "bitpix": (0, -8, 1, 32767),
    "vox_offset": (0.0, -1.0, NAN, INF, 1e12, 348.0, 353.0, 351.5, 6e7),
    "magic": (b"ni1", b"n+2", b"", b"\xff\xff\xff\xff"),
    "sizeof_hdr": (0, 540, 349, -1),
    "xyzt_units": (0, 1, 3, 255, 7),
    "intent_code": (3007, -1, 1011),
    "cal_max": (NAN, INF),
}
EXTENSIONS = (
    np.array([16, 6], "<i4").tobytes() + b"comment\0",
    np.array([0, 6], "<i4").tobytes(),
    np.array([-16, 6], "<i4").tobytes(),
    np.array([2**31 - 16, 2], "<i4").tobytes(),
    np.array([7, 32], "<i4").tobytes() + b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><CIFTI>&a;</CIFTI>",
)


MGH = {  # fields of FreeSurfer's header, and hostile values of each
    "version": (0, 2, -1),
    "dims": ([0, 9, 10, 1], [-8, 9, 10, 1], [8, 9, 10, 3], [2**15, 2**15, 2**15, 1], [8, 9, 11, 1], [2**31 - 1] * 4),
    "type": (0, 1, 2, 4, 7, -1, 10),
    "goodRASFlag": (0, -1, 7),
    "delta": ([0, 1, 1], [NAN, 1, 1], [1e30, 1, 1], [-1, 1, 1]),
    "Mdc": ([[0] * 3] * 3, [[1, 0, 0]] * 3, [[NAN] * 3] * 3, [[INF, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "Pxyz_c": ([NAN, 0, 0], [1e38, 0, 0]),
}


def mgh(fields: dict) -> bytes:
    """A small FreeSurfer volume; `fields` are written as they are."""
    image = nibabel.MGHImage(np.random.default_rng(0).uniform(1, 250, (8, 9, 10)).astype(np.float32), np.diag([2.0, 2, 2, 1]))
    content = bytearray(image.to_bytes())
    for name, value in fields.items():
        image.header[name] = value
    content[:90] = image.header.binaryblock[:90]
    return bytes(content)


@functools.cache
def _bomb() -> bytes:
    """200 kB that unpack to a scan and 200 MB of zeros."""
    return gzip.compress(nifti("single")[0] + bytes(200 * 2**20), 9)


@st.composite
def scans(draw) -> Case:
    kind, dtype = (
        draw(st.sampled_from(("single", "pair"))),
        draw(st.sampled_from(("u1", "i2", "i4", "u2", "f4", "f8", "c8", "i8"))),
    )
    order, mutations, fields = draw(st.sampled_from("<>")), [], {}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True)):
        fields[name] = draw(st.sampled_from(FIELDS[name]))
        mutations.append(f"{name} {fields[name]}")
    extension = draw(st.sampled_from((b"", b"", *EXTENSIONS)))
    header, voxels = nifti(kind, dtype, order, fields, extension)
    packed = draw(st.booleans())
    end = ".gz" if packed else ""
    names = (f"scan.nii{end}",) if kind == "single" else (f"scan.hdr{end}", f"scan.img{end}")
    files = {name: gzip.compress(content, 1) if packed else content for name, content in zip(names, (header, voxels))}
    scan = draw(st.sampled_from(names))
    what = draw(
        st.sampled_from(("", "", "", "bomb", "truncated", "lone", "link out", "twice packed", "text", "wrong name", "mgz"))
    )
    if what == "bomb":
        files, scan = {"scan.nii.gz": _bomb()}, "scan.nii.gz"
    elif what == "truncated":
        files[scan] = files[scan][: draw(st.integers(0, len(files[scan])))]
    elif what == "lone":
        files = {scan: files[scan]}
    elif what == "link out":
        files, scan = {"scan.nii.gz": Link(f"../{OUTSIDE}/secret.nii.gz")}, "scan.nii.gz"
    elif what == "twice packed":
        files = {name: gzip.compress(content) for name, content in files.items()}
    elif what == "text":
        files[scan] = b"participant_id\tage\n" * draw(st.integers(0, 40))
    elif what == "mgz":
        name = draw(st.sampled_from(sorted(MGH)))
        fields = {name: draw(st.sampled_from(MGH[name]))}
        files, scan, mutations = {"scan.mgz": gzip.compress(mgh(fields), 1)}, "scan.mgz", [f"{name} {fields[name]}"]
    elif what == "wrong name":
        other = draw(st.sampled_from(("scan.mgz", "scan.nii.bz2", "scan.NII", "scan", "scan.dcm", "scan.img")))
        files, scan = {other: files[scan]}, other
    case = Case("read_volume", (dtype + order, *mutations, *[what][: bool(what)]), files, scan)
    case = draw(with_bytes_damaged(case))
    if what == "link out" or draw(st.integers(0, 9)) == 0:
        settings = {"config.yaml": yaml.safe_dump(CONFIG).encode(), "scans.csv": TABLE_OF_ONE.format(scan=scan).encode()}
        case = replace(case, reader="prepare", files={**case.files, **settings})
    return case
