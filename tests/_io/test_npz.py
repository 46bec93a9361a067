"""Arrays of .npz files: what numpy writes comes back; what a small file might become is never taken in."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedkit._io.npz import read_npz

LIMIT = 1 << 20


def npz(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def header(shape, descr="|u1"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text


def zipped(content, how=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("a.npy", content)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["u1", "f4", ">f8", "i8", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_what_numpy_writes_comes_back(save, dtype, shape):
    for array in (
        np.ones(shape, dtype),
        np.asfortranarray(np.arange(np.prod(shape)).reshape(shape).astype(dtype)),
    ):
        found = read_npz(npz(save, a=array, b=np.ones(2)), ["a"], limit=LIMIT)
        assert found.keys() == {"a"} and found["a"].dtype == array.dtype and np.array_equal(found["a"], array)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a zip file"),
        (npz(b=np.ones(1)), "no array 'a'"),
        (npz(a=np.ones(LIMIT // 8 + 1)), "expected at most"),
        (npz(a=np.array(["x"])), "expected numbers"),
        (npz(a=np.array([1 + 1j])), "expected numbers"),
        (zipped(header((1 << 40, 1 << 40))), "expected at most"),
        (zipped(header((1 << 63, 0))), ""),
        (zipped(header((-1,))), "expected at most"),
        (zipped(header((-1, -1))), "expected at most"),
        (zipped(header((True,))), ""),
        (zipped(header((3,)) + b"12"), "not those of"),
        (zipped(header((3,)) + b"1234"), "not those of"),
        (zipped(header((3,), "|O") + b"12"), "expected numbers"),
        (zipped(b"\x93NUMPY\x09\0"), "format 9.0"),
        (zipped(b"\x93NUMPY\x02\0" + b"\xff" * 4), ""),
        (zipped(header((3,)) + b"123", zipfile.ZIP_LZMA), "another way"),
        (zipped(header((3,)) + b"123", zipfile.ZIP_BZIP2), "another way"),
    ],
)
def test_what_is_refused(data, why):
    try:
        found = read_npz(data, ["a"], limit=LIMIT)
    except ValueError as error:
        assert why in str(error) and "\n" not in str(error)
    else:
        assert not why and found["a"].nbytes <= LIMIT


def test_the_limit_is_of_all_arrays_together():
    data = npz(a=np.zeros(LIMIT * 3 // 5, np.uint8), b=np.zeros(LIMIT * 3 // 5, np.uint8))
    assert len(read_npz(data, ["a"], limit=LIMIT)) == 1
    with pytest.raises(ValueError, match="b: expected at most"):
        read_npz(data, ["a", "b"], limit=LIMIT)


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
def test_any_bytes_are_arrays_or_a_value_error(noise, start, stop):
    good = npz(np.savez_compressed, a=np.arange(60, dtype=np.float32))
    for data in (noise, good[:start] + noise + good[stop:]):
        try:
            found = read_npz(data, ["a"], limit=LIMIT)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert found["a"].nbytes <= LIMIT


def test_a_bomb_takes_no_memory(tmp_path):
    """A quarter of a gigabyte of zeros behind an honest header of three bytes, and a header that claims them."""
    for number, shape in enumerate([(3,), (2 << 30,)]):
        with zipfile.ZipFile(tmp_path / f"{number}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("a.npy", "w", force_zip64=True) as member:
                member.write(header(shape))
                for _ in range(256):
                    member.write(bytes(1 << 20))
    code = (
        "import sys, resource\n"
        "from embedkit._io.npz import read_npz\n"
        "data = [open(name, 'rb').read() for name in sys.argv[1:]]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for one in data:\n"
        "    try: read_npz(one, ['a'], limit=1 << 20)\n"
        "    except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    files = [str(tmp_path / "0.npz"), str(tmp_path / "1.npz")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    first, second, grown = done.stdout.splitlines()
    assert "not those of" in first and "expected at most" in second
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 32 << 20
