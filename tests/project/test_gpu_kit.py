"""tools/gpu_kit.py without a network: other chips' machine code is zeroed, and what is packed is what is needed."""

import lzma
import struct
import tarfile
import zipfile

import pytest

import gpu_kit


def fatbin(*programs):
    """A container of machine code: pairs of a chip and its bytes."""
    entries = b"".join(
        struct.pack("<HHIQ12xI", 2, 1, 64, len(code), chip).ljust(64, b"\0") + code for chip, code in programs
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def library(code):
    """An ELF file with the names of its sections, and one section of machine code."""
    names = b"\0.nv_fatbin\0.names\0"
    sections = [(0, 0, 0), (1, 64, len(code)), (12, 64 + len(code), len(names))]
    table = b"".join(struct.pack("<IIQQQQ", name, 1, 0, 0, at, size).ljust(64, b"\0") for name, at, size in sections)
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x28, 64 + len(code) + len(names))
    struct.pack_into("<HHH", head, 0x3A, 64, len(sections), 2)
    return bytearray(bytes(head) + code + names + table)


def test_the_machine_code_of_other_chips_is_zeroed():
    code = fatbin((80, b"A" * 24), (90, b"B" * 40)) + b"\0" * 8 + fatbin((100, b"C" * 16), (90, b"D" * 8))
    made = library(code)
    before = len(made)
    assert gpu_kit.keep_chip(made, 90) == (2, 40)
    assert len(made) == before and b"A" not in made and b"C" not in made
    assert made.count(b"B") == 40 and made.count(b"D") == 8
    with pytest.raises(ValueError, match="no machine code for sm_75"):
        gpu_kit.keep_chip(library(code), 75)


def test_a_kit_holds_modules_and_two_extensions(tmp_path):
    wheel = tmp_path / "vllm-0.32.0-cp38-abi3-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm/__init__.py", "vllm/a/b.json", "vllm/benchmarks/c.py", "vllm/d.so", "vllm/vllm-rs"):
            archive.writestr(name, name)
        archive.writestr("vllm-0.32.0.dist-info/entry_points.txt", "x")
        for name in gpu_kit.EXTENSIONS:
            archive.writestr(name, bytes(library(fatbin((90, b"B" * 40), (80, b"A" * 9)))))
    gpu_kit.pack_vllm(wheel, tmp_path, 90)
    with tarfile.open(tmp_path / "vllm.txz") as modules:
        found = modules.getnames()
        assert modules.extractfile("vllm/__init__.py").read() == b"vllm/__init__.py"
    assert found == ["vllm/__init__.py", "vllm/a/b.json", "vllm-0.32.0.dist-info/entry_points.txt"]
    packed = lzma.decompress((tmp_path / "vllm+_C_stable_libtorch.abi3.so.xz").read_bytes())
    assert packed.count(b"B") == 40 and b"A" not in packed
    assert (tmp_path / "vllm+vllm_flash_attn+_vllm_fa3_C.abi3.so.xz").exists()
