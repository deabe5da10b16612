"""SafetensorsFile: reads what the format allows, without copying, and refuses every damaged file by its "
"numbers."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model_files import safetensors_bytes, write_safetensors
from tinyvllm.errors import ModelFileError, ModelNotFoundError
from tinyvllm.loader.safetensors_file import DTYPE_BITS, SafetensorsFile


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        return path

    return write


# ---- what is right ----


def test_tensors_are_read_with_their_places_in_the_file(tmp_path):
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    halves, floats = np.array([1.5, -2.0], np.float16), np.array([[3.25]], np.float32)
    path = write_safetensors(
        tmp_path / "x.safetensors",
        {"a": ("BF16", bits), "b": ("F16", halves), "c": ("F32", floats)},
        metadata={"format": "pt"},
    )
    file = SafetensorsFile(path)
    raw = path.read_bytes()
    assert file.size == len(raw) and file.metadata == {"format": "pt"}
    assert struct.unpack("<Q", raw[:8]) == (file.header_length,) and file.data_start == 8 + file.header_length
    assert json.loads(file.raw_header()) == json.loads(raw[8 : file.data_start])
    assert [info.name for info in file] == ["a", "b", "c"]
    assert raw[file.info("b").begin : file.info("b").end] == halves.tobytes()
    assert (file.info("a").shape, file.info("a").num_elements, file.info("a").nbytes) == ((3, 4), 12, 24)
    for name, expected in (("a", bits), ("b", halves), ("c", floats)):
        array = file.array(name)
        assert array.dtype == expected.dtype and np.array_equal(array, expected)


def test_arrays_are_read_only_views_that_outlive_the_file_object(tmp_path):
    values = np.arange(6, dtype=np.uint16)
    array = SafetensorsFile(write_safetensors(tmp_path / "x.safetensors", {"a": ("BF16", values)})).array("a")
    assert not array.flags.owndata and not array.flags.writeable
    assert np.array_equal(array, values)


def test_released_tensors_can_be_read_again(tmp_path):
    values = np.arange(100_000, dtype=np.uint16)
    path = write_safetensors(
        tmp_path / "x.safetensors", {"a": ("BF16", values), "none": ("BF16", values[:0])}
    )
    file = SafetensorsFile(path)
    array = file.array("a")
    for name in ("a", "a", "none"):
        file.release(name)
    assert np.array_equal(array, values) and np.array_equal(file.array("a"), values)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's memory counters")
def test_released_tensors_do_not_count_as_used_memory(tmp_path):
    def mapped_kib():
        counters = Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(re.search(r"Rss: +(\d+) kB", counters)[1])

    path = write_safetensors(tmp_path / "x.safetensors", {"a": ("BF16", np.ones(1 << 20, np.uint16))})
    file = SafetensorsFile(path)
    assert int(file.array("a").sum(dtype=np.int64)) == 1 << 20 and mapped_kib() >= 2048
    file.release("a")
    assert mapped_kib() < 100


def test_data_may_lie_in_another_order_than_the_header(write):
    header = {"late": entry("U8", [2], 2, 4), "early": entry("U8", [2], 0, 2)}
    assert list(SafetensorsFile(write(safetensors_bytes(header, b"abcd"))).tensors) == ["early", "late"]


def test_empty_files_scalars_and_zero_sizes(write):
    assert SafetensorsFile(write(safetensors_bytes({}))).tensors == {}
    header = {"scalar": entry("F32", [], 0, 4), "none": entry("BF16", [0, 8], 4, 4)}
    file = SafetensorsFile(write(safetensors_bytes(header, b"\0" * 4)))
    assert file.array("scalar").shape == () and file.array("none").shape == (0, 8)


def test_other_dtypes_are_listed_but_are_no_weights(write):
    header = {"a": entry("F8_E4M3", [4], 0, 4), "b": entry("F4", [4], 4, 6), "c": entry("I64", [1], 6, 14)}
    file = SafetensorsFile(write(safetensors_bytes(header, b"\0" * 14)))
    assert {info.dtype for info in file} == {"F8_E4M3", "F4", "I64"}
    with pytest.raises(ModelFileError, match=r"'a' has dtype F8_E4M3, .* \(supported: BF16, F16, F32\)"):
        file.array("a")


def test_an_unknown_name_is_an_error(write):
    with pytest.raises(ModelFileError, match="there is no tensor 'x'; it holds 0 others"):
        SafetensorsFile(write(safetensors_bytes({}))).array("x")


def test_the_library_reads_our_test_files_and_we_read_the_librarys(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
    }
    safetensors_numpy.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"k": "v"})
    theirs = SafetensorsFile(tmp_path / "theirs.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", {"a": ("F32", tensors["a"]), "b": ("F16", tensors["b"])})
    ours = safetensors_numpy.load_file(tmp_path / "ours.safetensors")
    for name, values in tensors.items():
        assert np.array_equal(theirs.array(name), values) and np.array_equal(ours[name], values)


# ---- what is wrong ----

ONE = {"a": entry("BF16", [2, 3], 0, 12)}
BROKEN = {
    "empty file": (b"", "the file has 0 bytes; a safetensors file begins with an 8-byte header length"),
    "shorter than 8 bytes": (b"1234567", "the file has 7 bytes"),
    "header longer than the file": (
        safetensors_bytes(ONE, b"\0" * 12, header_length=1_000_000),
        "the header says it is 1,000,000 bytes long, but only 70 bytes follow",
    ),
    "absurd header length": (b"\xff" * 16, "the header says it is 18,446,744,073,709,551,615 bytes long"),
    "header length with nothing after": (struct.pack("<Q", 5), "is 5 bytes long, but only 0 bytes follow"),
    "not JSON": (safetensors_bytes(b"{'a': 1}"), "not valid JSON: .* character 1 of the header"),
    "no header": (safetensors_bytes(b""), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not UTF-8 text .at byte 10 of the file"),
    "a list": (safetensors_bytes(b"[]"), "must be a JSON object, got list"),
    "endless nesting": (safetensors_bytes(b"[" * 200_000), "not usable JSON"),
    "a key twice": (
        safetensors_bytes(b'{"a": %s, "a": %s}' % ((json.dumps(ONE["a"]).encode(),) * 2), b"\0" * 12),
        "the header has the key 'a' twice",
    ),
    "metadata that is no object": (
        safetensors_bytes({"__metadata__": [1]}),
        "__metadata__ must be an object",
    ),
    "entry that is no object": (
        safetensors_bytes({"a": 3}),
        "'a' must have exactly dtype, shape and data_offsets",
    ),
    "missing offsets": (safetensors_bytes({"a": {"dtype": "F32", "shape": []}}), "got dtype, shape"),
    "unknown dtype": (
        safetensors_bytes({"a": entry("F7", [1], 0, 4)}),
        "'a' has the unknown dtype 'F7' .known: F4",
    ),
    "negative size": (safetensors_bytes({"a": entry("F32", [-1], 0, 4)}), r"has the shape \[-1\]"),
    "size that is no number": (
        safetensors_bytes({"a": entry("F32", [True], 0, 4)}),
        r"has the shape \[True\]",
    ),
    "shape that is no list": (safetensors_bytes({"a": entry("F32", 4, 0, 4)}), "has the shape 4"),
    "end before begin": (safetensors_bytes({"a": entry("U8", [0], 4, 0)}), r"data_offsets \[4, 0\]"),
    "negative begin": (safetensors_bytes({"a": entry("U8", [4], -4, 0)}), r"data_offsets \[-4, 0\]"),
    "three offsets": (
        safetensors_bytes({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}),
        r"data_offsets \[0, 1, 2\]",
    ),
    "fractional offset": (safetensors_bytes({"a": entry("U8", [1], 0, 1.0)}), r"data_offsets \[0, 1.0\]"),
    "size against shape": (
        safetensors_bytes({"a": entry("BF16", [2, 3], 0, 10)}, b"\0" * 10),
        r"'a' has 10 bytes of data, but BF16 of shape \[2, 3\] takes 12",
    ),
    "shape beyond 64 bits": (
        safetensors_bytes({"a": entry("BF16", [2**40, 2**40], 0, 0)}),
        r"'a' has 0 bytes of data, but BF16 of shape .* takes",
    ),
    "overlap": (
        safetensors_bytes({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 4, 12)}, b"\0" * 12),
        r"'b' \(bytes 118 to 126 of the file\) overlaps tensor 'a', which ends at byte 122",
    ),
    "the same bytes twice": (
        safetensors_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"\0" * 4),
        "'b' .* overlaps tensor 'a'",
    ),
    "out of range": (
        safetensors_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 1000, 1004)}, b"\0" * 8),
        r"'b' is out of range: it says it lies at bytes 1,119 to 1,123 of the file, which has 127 bytes",
    ),
    "hole": (
        safetensors_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, b"\0" * 10),
        "2 bytes between tensor 'a' .* and tensor 'b' .* belong to no tensor",
    ),
    "hole at the start": (
        safetensors_bytes({"a": entry("U8", [4], 4, 8)}, b"\0" * 8),
        "4 bytes between the header .* and tensor 'a'",
    ),
    "bytes at the end": (
        safetensors_bytes(ONE, b"\0" * 15),
        "3 bytes at the end, from byte 78, belong to no tensor",
    ),
    "truncated": (
        safetensors_bytes({**ONE, "b": entry("F32", [100], 12, 412)}, b"\0" * 112),
        "describes 536 bytes and it has 236, so 300 bytes are missing, from tensor 'b' on. Download it again",
    ),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "Git LFS pointer .* `git lfs pull`",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_refused_with_its_numbers(name, write):
    content, message = BROKEN[name]
    path = write(content)
    with pytest.raises(ModelFileError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no\.safetensors does not exist"):
        SafetensorsFile(tmp_path / "no.safetensors")
    with pytest.raises(ModelFileError, match="cannot be read"):
        SafetensorsFile(tmp_path)


def test_cutting_a_file_anywhere_is_noticed(tmp_path):
    tensors = {"a": ("BF16", np.zeros((3, 4), np.uint16)), "b": ("F32", np.zeros(5, np.float32))}
    raw = write_safetensors(tmp_path / "x.safetensors", tensors).read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut.safetensors").write_bytes(raw[:length])
        with pytest.raises(ModelFileError):
            SafetensorsFile(tmp_path / "cut.safetensors")


RIGHT = safetensors_bytes(
    {"__metadata__": {"format": "pt"}, "a": entry("BF16", [2, 3], 0, 12), "b": entry("F32", [4], 12, 28)},
    b"\0" * 28,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, len(RIGHT) - 1), st.binary(min_size=0, max_size=3)), min_size=1, max_size=3
    )
)
def test_random_damage_gives_a_valid_file_or_a_model_file_error(write, edits):
    content = RIGHT
    for position, replacement in edits:
        content = content[:position] + replacement + content[position + 1 :]
    path = write(content)
    try:
        file = SafetensorsFile(path)
    except ModelFileError:
        return
    covered = sum(info.nbytes for info in file)
    assert covered == len(content) - file.data_start
    assert all(info.nbytes * 8 == info.num_elements * DTYPE_BITS[info.dtype] for info in file)
