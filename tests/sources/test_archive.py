import zipfile

import numpy as np
import pytest

from deflow_torchrl.errors import InputError
from deflow_torchrl.sources.archive import NpzArchive, readable

ARRAYS = {
    "a": np.arange(5000.0).reshape(1000, 5),
    "images": np.random.default_rng(0).integers(256, size=(50, 4, 4, 3), dtype=np.uint8),
    "fortran": np.asfortranarray(np.arange(20.0).reshape(10, 2)),
    "flat": np.arange(7),
    "scalar": np.array(3),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_slices_are_what_numpy_loads(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    with NpzArchive(tmp_path / "x.npz") as archive:
        assert archive.names == list(ARRAYS)
        for name, expected in ARRAYS.items():
            column = archive[name]
            assert (column.shape, column.dtype) == (expected.shape, expected.dtype)
            if name == "scalar":
                continue
            for rows in (slice(0, 3), slice(5, 7), slice(1, 2), slice(0, len(expected)), slice(4, 4)):
                np.testing.assert_array_equal(column[rows], expected[rows])


def test_pickled_objects_are_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the file's code was run",))

    np.savez(tmp_path / "x.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(InputError, match="pickled objects, which are never loaded"):
        NpzArchive(tmp_path / "x.npz")


def test_damage_is_one_line_naming_the_file(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **ARRAYS)
    content = path.read_bytes()
    with pytest.raises(InputError, match="no data file"):
        NpzArchive(tmp_path / "nowhere.npz")
    flipped = bytearray(content)
    flipped[500] ^= 255
    path.write_bytes(flipped)
    with NpzArchive(path) as archive, pytest.raises(InputError, match=r"x\.npz cannot be read"), readable(path):
        archive["a"][0:1000]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"x\.npz cannot be read"):
        NpzArchive(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", b"\x93NUMPY\x07\x00")
    with pytest.raises(InputError, match="cannot be read"):
        NpzArchive(path)


def test_an_encrypted_archive_is_one_line(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(3))
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag of the file's own header, and of the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz cannot be read \(it is encrypted\)"):
        NpzArchive(path)
