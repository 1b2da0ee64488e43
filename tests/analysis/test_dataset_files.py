from __future__ import annotations

import gzip
import io
import lzma
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ellq.analysis import dataset_files
from ellq.analysis.dataset_files import (
    CIFAR10_CLASSES,
    read_cifar_archive,
    read_cifar_binary,
    read_cifar_pickles,
    read_class_zip,
    read_idx,
    read_idx_pair,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 1, 1])
RECORDS = np.column_stack([LABELS.astype(np.uint8), IMAGES.reshape(5, -1)]).tobytes()
DIGITS = tuple("0123456789")


def idx_bytes(array: np.ndarray, *, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def image_bytes(array: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format=kind)
    return file.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


class TestIdx:
    @pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
    def test_reads_back_what_was_written(self, tmp_path, suffix, pack):
        path = tmp_path / f"images{suffix}"
        path.write_bytes(pack(idx_bytes(IMAGES[:, 0])))
        assert np.array_equal(read_idx(path), IMAGES[:, 0])

    def test_pair_has_one_channel_and_int64_labels(self, tmp_path):
        (tmp_path / "i").write_bytes(idx_bytes(IMAGES[:, 0]))
        (tmp_path / "l").write_bytes(idx_bytes(LABELS.astype(np.uint8)))
        examples = read_idx_pair(tmp_path / "i", tmp_path / "l", DIGITS)
        assert examples.images.shape == (5, 1, 32, 32)
        assert examples.labels.dtype == np.int64
        assert examples.labels.tolist() == LABELS.tolist()

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "magic"),
            (b"\x7fELF" + bytes(20), "magic"),
            (idx_bytes(IMAGES[:, 0], kind=0x0D), "0x0d"),
            (idx_bytes(IMAGES[:, 0])[:9], "inside its IDX header"),
            (idx_bytes(IMAGES[:, 0])[:-1], "5120 bytes, but holds 5119"),
            (idx_bytes(IMAGES[:, 0]) + b"\0", "5120 bytes, but holds 5121"),
        ],
    )
    def test_refuses_a_damaged_file_by_name(self, tmp_path, content, complaint):
        path = tmp_path / "damaged-idx3-ubyte"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"damaged-idx3-ubyte.*{complaint}"):
            read_idx(path)

    @pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
    def test_refuses_a_truncated_or_foreign_compressed_file(self, tmp_path, suffix, pack):
        path = tmp_path / f"cut{suffix}"
        for content in (pack(idx_bytes(IMAGES))[:-20], b"not compressed at all"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"cut\{suffix}' is not a complete {suffix[1:]} file"):
                read_idx(path)

    def test_a_missing_file_is_missing_not_damaged(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_idx(tmp_path / "absent.gz")

    @pytest.mark.parametrize(
        ("labels", "complaint"),
        [
            (np.zeros(4, np.uint8), "5 images but .* 4 labels"),
            (np.zeros((5, 1), np.uint8), "2 axes where 1"),
            (np.full(5, 10, np.uint8), "label 10, but there are 10 classes"),
        ],
    )
    def test_refuses_labels_that_do_not_fit(self, tmp_path, labels, complaint):
        (tmp_path / "i").write_bytes(idx_bytes(IMAGES[:, 0]))
        (tmp_path / "l").write_bytes(idx_bytes(labels))
        with pytest.raises(ValueError, match=complaint):
            read_idx_pair(tmp_path / "i", tmp_path / "l", DIGITS)


class TestCifarBinary:
    @pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
    def test_reads_batches_in_order(self, tmp_path, suffix, pack):
        paths = [tmp_path / f"{name}.bin{suffix}" for name in ("b", "a")]
        paths[0].write_bytes(pack(RECORDS[: 2 * 3073]))
        paths[1].write_bytes(pack(RECORDS[2 * 3073 :]))
        examples = read_cifar_binary(paths)
        assert np.array_equal(examples.images, IMAGES)
        assert examples.labels.tolist() == LABELS.tolist()
        assert examples.classes == CIFAR10_CLASSES

    def test_takes_the_names_of_the_classes_from_the_file(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(RECORDS)
        (tmp_path / "names").write_text("".join(f"class {index}\n" for index in range(10)) + "\n")
        assert read_cifar_binary([tmp_path / "a.bin"], tmp_path / "names").classes[3] == "class 3"

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [(b"", "holds 0 bytes"), (RECORDS[:-1], "whole number"), (b"\x0a" + RECORDS[1:], "label 10")],
    )
    def test_refuses_a_damaged_batch_by_name(self, tmp_path, content, complaint):
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.bin.*{complaint}"):
            read_cifar_binary([tmp_path / "bad.bin"])

    def test_refuses_no_batch_and_no_name(self, tmp_path):
        with pytest.raises(ValueError, match="paths is empty"):
            read_cifar_binary([])
        (tmp_path / "names").write_text("\n\n")
        with pytest.raises(ValueError, match="names no class"):
            read_cifar_binary([tmp_path / "names"], tmp_path / "names")


def python2_pickle() -> bytes:
    """The opcodes that Python 2 wrote the official batches with."""
    raw = IMAGES.tobytes()
    return (
        b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x05M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
        b"U\x06labels]("
        + b"".join(b"K" + bytes([label]) for label in LABELS.tolist())
        + b"eU\tfilenames](U\x01aU\x01beu."
    )


class Runs:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class TestCifarPickles:
    def test_reads_what_python_2_wrote(self, tmp_path):
        (tmp_path / "test_batch").write_bytes(python2_pickle())
        assert len(list(pickletools.genops(python2_pickle()))) > 20
        examples = read_cifar_pickles([tmp_path / "test_batch"])
        assert np.array_equal(examples.images, IMAGES)
        assert examples.labels.tolist() == LABELS.tolist()

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("as_key", [str.encode, str])
    def test_reads_what_this_python_writes(self, tmp_path, protocol, as_key):
        batch = {as_key("data"): IMAGES.reshape(5, -1), as_key("labels"): LABELS.tolist()}
        (tmp_path / "batch").write_bytes(pickle.dumps(batch, protocol))
        assert np.array_equal(read_cifar_pickles([tmp_path / "batch"]).images, IMAGES)

    def test_reads_an_array_in_fortran_order(self, tmp_path):
        batch = {b"data": np.asfortranarray(IMAGES.reshape(5, -1)), b"labels": LABELS.tolist()}
        (tmp_path / "batch").write_bytes(pickle.dumps(batch, 4))
        assert np.array_equal(read_cifar_pickles([tmp_path / "batch"]).images, IMAGES)

    def test_executes_nothing(self, tmp_path):
        trace = tmp_path / "executed"
        attacks = [
            Runs(os.mkdir, str(trace)),
            Runs(eval, f"__import__('os').mkdir({str(trace)!r})"),
            {b"data": IMAGES.reshape(5, -1), b"labels": [Runs(os.mkdir, str(trace))]},
            Runs(np.load, "anything"),
            Runs(getattr, [], "append"),
        ]
        for attack in attacks:
            for protocol in range(6):
                (tmp_path / "evil").write_bytes(pickle.dumps(attack, protocol))
                with pytest.raises(ValueError, match=r"evil.*not allowed"):
                    read_cifar_pickles([tmp_path / "evil"])
        assert not trace.exists()

    def test_the_attack_would_have_worked_on_plain_pickle(self, tmp_path):
        pickle.loads(pickle.dumps(Runs(os.mkdir, str(tmp_path / "executed"))))
        assert (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        "batch",
        [
            [1, 2],
            {},
            {b"data": IMAGES.reshape(5, -1)},
            {b"data": IMAGES.reshape(5, -1), b"labels": [0, 1]},
            {b"data": IMAGES.reshape(5, -1), b"labels": [0, 1, 2, 3, 10]},
            {b"data": IMAGES.reshape(5, -1), b"labels": [0, 1, 2, 3, -1]},
            {b"data": IMAGES.reshape(5, -1), b"labels": [0, 1, 2, 3, 4.5]},
            {b"data": IMAGES.reshape(5, -1)[:, 1:], b"labels": LABELS.tolist()},
            {b"data": IMAGES.reshape(5, -1).astype(np.uint16), b"labels": LABELS.tolist()},
            {b"data": IMAGES.tolist(), b"labels": LABELS.tolist()},
            {b"data": np.array([None] * 3072), b"labels": [1]},
        ],
    )
    def test_refuses_what_is_no_batch(self, tmp_path, batch):
        (tmp_path / "odd").write_bytes(pickle.dumps(batch))
        with pytest.raises(ValueError, match=r"odd' (is not a CIFAR-10 batch|holds)"):
            read_cifar_pickles([tmp_path / "odd"])

    @pytest.mark.parametrize("content", [b"", b"hello", python2_pickle()[:-1], python2_pickle()[:9000]])
    def test_refuses_a_truncated_pickle(self, tmp_path, content):
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(ValueError, match="cut' is not a CIFAR-10 batch"):
            read_cifar_pickles([tmp_path / "cut"])


class TestCifarArchive:
    def test_reads_both_layouts(self, tmp_path):
        binary = write_tar(
            tmp_path / "b.tar.gz",
            {
                "cifar-10-batches-bin/readme.html": b"hello",
                "cifar-10-batches-bin/test_batch.bin": RECORDS,
                "cifar-10-batches-bin/batches.meta.txt": "\n".join("abcdefghij").encode(),
            },
        )
        python = write_tar(tmp_path / "p.tar.gz", {"cifar-10-batches-py/test_batch": python2_pickle()})
        for path, classes in ((binary, tuple("abcdefghij")), (python, CIFAR10_CLASSES)):
            examples = read_cifar_archive(path, ("test_batch",))
            assert np.array_equal(examples.images, IMAGES)
            assert examples.labels.tolist() == LABELS.tolist()
            assert examples.classes == classes

    def test_unpacks_nothing_whatever_the_members_are_called(self, tmp_path):
        inside = tmp_path / "inside"
        inside.mkdir()
        path = write_tar(inside / "a.tar.gz", {"../../test_batch.bin": RECORDS, "/etc/ellq": b"x"})
        assert np.array_equal(read_cifar_archive(path, ("test_batch",)).images, IMAGES)
        assert sorted(tmp_path.rglob("*")) == [inside, path]

    def test_refuses_an_archive_that_is_cut_foreign_or_incomplete(self, tmp_path):
        whole = write_tar(tmp_path / "a.tar.gz", {"data_batch_1.bin": RECORDS}).read_bytes()
        path = tmp_path / "bad.tar.gz"
        for content in (whole[:2000], b"no archive"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"bad.tar.gz' is not a complete tar archive"):
                read_cifar_archive(path, ("data_batch_1",))
        with pytest.raises(ValueError, match=r"a.tar.gz' holds no data_batch_2.bin"):
            read_cifar_archive(tmp_path / "a.tar.gz", ("data_batch_1", "data_batch_2"))


GREY, COLOUR = IMAGES[0, 0, :4, :5], np.ascontiguousarray(IMAGES[1, :, :4, :5].transpose(1, 2, 0))


class TestClassZip:
    def test_reads_classes_in_order_and_images_exactly(self, tmp_path):
        members = {
            "test/dog/0001.png": image_bytes(COLOUR[::-1].copy()),
            "test/cat/0002.png": image_bytes(COLOUR),
            "test/cat/0001.PNG": image_bytes(COLOUR * 2),
            "test/": b"",
            "test/.DS_Store": b"x",
            "__MACOSX/test/cat/._0001.png": b"x",
            "README.txt": b"x",
        }
        examples = read_class_zip(write_zip(tmp_path / "test.zip", members))
        assert examples.classes == ("cat", "dog")
        assert examples.labels.tolist() == [0, 0, 1]
        assert examples.images.shape == (3, 3, 4, 5)
        assert np.array_equal(examples.images[1], COLOUR.transpose(2, 0, 1))

    def test_grey_images_stay_grey_unless_one_is_in_colour(self, tmp_path):
        grey = {"cat/0.png": image_bytes(GREY), "dog/0.png": image_bytes(GREY)}
        assert read_class_zip(write_zip(tmp_path / "g.zip", grey)).images.shape == (2, 1, 4, 5)
        mixed = read_class_zip(write_zip(tmp_path / "m.zip", {**grey, "dog/1.png": image_bytes(COLOUR)})).images
        assert mixed.shape == (3, 3, 4, 5)
        assert (mixed[0] == GREY).all()

    def test_decodes_jpeg(self, tmp_path):
        flat = np.full((8, 8, 3), 130, np.uint8)
        path = write_zip(tmp_path / "a.zip", {"train/x/0.jpg": image_bytes(flat, "jpeg")})
        assert np.abs(read_class_zip(path).images.astype(int) - 130).max() <= 1

    def test_labels_follow_the_classes_given(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", {"train/x/0.png": image_bytes(GREY)})
        assert read_class_zip(path, ["w", "x"]).labels.tolist() == [1]
        with pytest.raises(ValueError, match="class 'x', which is not among w"):
            read_class_zip(path, ["w"])

    @pytest.mark.parametrize(
        ("members", "complaint"),
        [
            ({}, "holds no class"),
            ({"readme.txt": b"x", "0.png": image_bytes(GREY)}, "holds no class"),
            ({"test/cat/0.png": b"not a picture"}, "Image 'test/cat/0.png' .* cannot be read"),
            ({"test/cat/0.png": image_bytes(COLOUR)[:60]}, "Image 'test/cat/0.png' .* cannot be read"),
            ({"test/cat/0.png": image_bytes(GREY.astype(np.uint16))}, "mode I;16"),
            ({"test/cat/0.gif": b"x"}, "is not an image named"),
            ({"a/test/cat/0.png": image_bytes(GREY)}, "is not an image named"),
            ({"test/cat/0.png": image_bytes(GREY), "train/cat/0.png": image_bytes(GREY)}, "mixes splits"),
            ({"a/0.png": image_bytes(GREY), "b/0.png": image_bytes(GREY[1:])}, "is 3x5 where 'a/0.png' is 4x5"),
            ({"../test/cat/0.png": image_bytes(GREY)}, "points outside the zip"),
            ({"/etc/cat/0.png": image_bytes(GREY)}, "points outside the zip"),
        ],
    )
    def test_refuses_what_it_cannot_read_and_writes_nothing(self, tmp_path, members, complaint):
        inside = tmp_path / "inside"
        inside.mkdir()
        path = write_zip(inside / "bad.zip", members)
        with pytest.raises(ValueError, match=complaint) as caught:
            read_class_zip(path)
        assert "bad.zip" in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == [inside, path]

    def test_refuses_a_damaged_zip(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", {"test/cat/0.png": image_bytes(GREY)})
        whole = path.read_bytes()
        for content in (whole[:-30], b"no zip", b""):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"a.zip' is not a complete zip file"):
                read_class_zip(path)
        middle = len("test/cat/0.png") + 30 + 20
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
        with pytest.raises(ValueError, match=r"cannot be read \(Bad CRC-32"):
            read_class_zip(path)
        with pytest.raises(FileNotFoundError, match=r"absent.zip"):
            read_class_zip(tmp_path / "absent.zip")


def test_long_reading_is_tracked(tmp_path, monkeypatch):
    seen = []

    def spy(items, description, *, total=None):
        seen.append(description)
        return iter(items)

    monkeypatch.setattr(dataset_files, "track", spy)
    (tmp_path / "a.bin").write_bytes(RECORDS)
    read_cifar_binary([tmp_path / "a.bin"])
    read_class_zip(write_zip(tmp_path / "z.zip", {"cat/0.png": image_bytes(GREY)}))
    assert seen == ["reading CIFAR-10", "decoding z.zip"]
