from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ellq.analysis import dataset_sources
from ellq.analysis.dataset_sources import CATALOGUE, Remote, search_roots
from ellq.analysis.datasets import Dataset, known_names, load, partition, refuse_overlap

RNG = np.random.default_rng(0)
DIGITS_TEST_DIGEST = "090f87d53f0d018321f897a0bee272a1c28a0b01d7229b77af61284f283c7948"
PARTITION_SIZES = [951, 195, 195]
PARTITION_DIGEST = "bd3eeb9b8e5a2a96179986cd1c98773033bbeb41ab9bd33708b431a122c396b2"
STEMS = {"train": "train", "test": "t10k"}


def make(images: np.ndarray, part: str = "train") -> Dataset:
    return Dataset("made", part, images, np.zeros(len(images), np.int64), ("only",))


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, part: str = "train", count: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.full((count, 28, 28), count, np.uint8)
    (folder / f"{STEMS[part]}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / f"{STEMS[part]}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8)))


def write_zips(folder: Path, **classes: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(png, format="png")
    for part, names in classes.items():
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for name in names:
                archive.writestr(f"{part}/{name}/0000.png", png.getvalue())


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No data folder and an empty cache."""
    monkeypatch.delenv("ELLQ_DATA", raising=False)
    monkeypatch.setattr(dataset_sources, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(dataset_sources.pooch, "retrieve", refuse)


def official(name: str, part: str) -> Dataset:
    """The real data set, or a skip that says where it was sought."""
    try:
        return load(name, part, download=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))


class TestDataset:
    def test_prints_in_one_line(self):
        assert repr(load("digits", "test")).startswith("Dataset('digits', 'test', ")
        assert repr(make(np.zeros((2, 3, 4, 5), np.uint8))) == "Dataset('made', 'train', 2 images 3x4x5, 1 classes)"

    def test_inputs_lie_in_the_unit_interval_exactly(self):
        images = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
        inputs = make(images).inputs(torch.float64)
        assert torch.equal(inputs, torch.arange(256.0, dtype=torch.float64).reshape(4, 1, 8, 8) / 255)
        assert make(images).inputs().dtype == torch.float32

    def test_inputs_of_digits_are_sixteenths(self):
        data = load("digits")
        assert np.array_equal(data.inputs().numpy() * 16, data.images)
        assert data.inputs(torch.float16).max() == 1

    def test_inputs_are_normalised_per_channel(self):
        data = make(RNG.integers(0, 256, (5, 3, 4, 4), dtype=np.uint8))
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        expected = (data.images / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        assert np.allclose(data.inputs(torch.float64, mean, std), expected, rtol=0, atol=1e-15)
        assert torch.equal(data.inputs(mean=0.5), data.inputs() - 0.5)

    def test_inputs_share_no_memory_with_the_images(self):
        data = make(np.ones((1, 1, 2, 2), np.uint8))
        data.inputs().zero_()
        assert data.images.all()

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"dtype": torch.int32}, "dtype=torch.int32"),
            ({"mean": (0.1, 0.2)}, "mean=.*does not fit 3 channels"),
            ({"std": float("nan")}, "std=nan"),
            ({"std": (1.0, 0.0, 1.0)}, "not positive"),
        ],
    )
    def test_inputs_refuse_what_does_not_fit(self, options, complaint):
        with pytest.raises(ValueError, match=complaint):
            make(np.zeros((2, 3, 4, 4), np.uint8)).inputs(**options)

    def test_select_takes_indices_and_masks(self):
        data = load("digits", "test")
        picked = data.select([3, -1, 3])
        assert np.array_equal(picked.images, data.images[[3, -1, 3]])
        assert np.array_equal(picked.labels, data.labels[[3, -1, 3]])
        assert picked.maximum == 16
        assert np.array_equal(data.select(data.labels == 7).labels, data.labels[data.labels == 7])
        assert len(data.select([])) == 0

    @pytest.mark.parametrize("indices", [[2], [-3], [0.5], 1, [[0]], [True], ["a"]])
    def test_select_refuses_what_is_no_index(self, indices):
        with pytest.raises(IndexError, match="do not index 2 examples"):
            make(np.zeros((2, 1, 2, 2), np.uint8)).select(indices)

    def test_digest_sees_every_pixel_label_and_shape(self):
        images = RNG.integers(0, 256, (4, 1, 2, 3), dtype=np.uint8)
        labels = np.array([0, 1, 0, 1])
        data = Dataset("a", "train", images, labels, ("x", "y"))
        other_pixel = images.copy()
        other_pixel[3, 0, 1, 2] ^= 1
        changed = [
            replace(data, images=other_pixel),
            replace(data, labels=1 - labels),
            replace(data, images=images.reshape(4, 1, 3, 2)),
            data.select([1, 0, 2, 3]),
        ]
        assert len({each.digest for each in (data, *changed)}) == 5
        assert replace(data, name="b", images=np.asfortranarray(images)).digest == data.digest
        assert len(data.digest) == 64

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"images": np.zeros((2, 2, 2), np.uint8)}, "images of 'made' have shape"),
            ({"images": np.zeros((2, 1, 2, 2))}, "type float64"),
            ({"labels": np.zeros(3, np.int64)}, r"Pass int64 of shape \(2,\)"),
            ({"labels": np.array([0, 1])}, "names 1"),
            ({"maximum": 0}, "maximum=0"),
            ({"images": np.full((2, 1, 2, 2), 17, np.uint8), "maximum": 16}, "maximum=16"),
        ],
    )
    def test_refuses_arrays_that_do_not_fit(self, change, complaint):
        with pytest.raises(ValueError, match=complaint):
            replace(make(np.zeros((2, 1, 2, 2), np.uint8)), **change)


class TestDigits:
    def test_parts_make_up_the_bundled_set(self, no_network):
        train, test = load("digits", "train"), load("digits", "test")
        assert len(train) + len(test) == 1797
        assert len(train) / 1797 == pytest.approx(0.75, abs=0.04)
        assert train.images.shape[1:] == (1, 8, 8)
        assert train.images.max() == train.maximum == 16
        assert train.classes == tuple("0123456789")
        assert set(test.labels) == set(range(10))
        refuse_overlap(train=train, test=test)

    def test_parts_never_change(self):
        # Recorded once: a change here silently moves examples between what is trained on and what is reported.
        assert len(load("digits", "train")) == 1341
        assert load("digits", "test").digest == DIGITS_TEST_DIGEST


class TestFinding:
    @pytest.mark.parametrize("below", ["mnist", "MNIST/raw"])
    def test_looks_below_root_and_below_the_environment_variable(self, alone, monkeypatch, no_network, below):
        write_mnist(alone / "data" / below)
        assert len(load("mnist", root=alone / "data")) == 4
        monkeypatch.setenv("ELLQ_DATA", str(alone / "data"))
        data = load("mnist")
        assert (data.images.shape, data.labels.tolist()) == ((4, 1, 28, 28), [0, 1, 2, 3])

    def test_root_goes_before_the_environment_variable_and_the_cache_comes_last(self, alone, monkeypatch):
        for place, count in (("root", 1), ("env", 2), ("cache", 3)):
            write_mnist(alone / place / "mnist", count=count)
        assert len(load("mnist")) == 3
        monkeypatch.setenv("ELLQ_DATA", str(alone / "env"))
        assert len(load("mnist")) == 2
        assert len(load("mnist", root=alone / "root")) == 1
        (alone / "root" / "mnist" / "train-labels-idx1-ubyte").unlink()
        assert len(load("mnist", root=alone / "root")) == 3

    def test_a_missing_set_is_told_with_every_place_and_what_to_do(self, alone, no_network):
        (alone / "data").mkdir()
        with pytest.raises(FileNotFoundError) as caught:
            load("fashion-mnist", "test", root=alone / "data", download=False)
        for told in (
            f"{alone}/data/fashion-mnist",
            f"{alone}/data/FashionMNIST/raw",
            f"{alone}/cache/fashion-mnist",
            "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz (or without .gz)",
            "Set ELLQ_DATA to the folder that holds 'fashion-mnist', or pass download=True.",
        ):
            assert told in str(caught.value)

    def test_what_has_no_address_does_not_offer_a_download(self, alone, no_network):
        with pytest.raises(FileNotFoundError, match=r"searched for train.zip. Set ELLQ_DATA.*'cifar10-jpeg'\.$"):
            load("cifar10-jpeg")

    def test_a_folder_that_does_not_exist_is_refused(self, alone, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"root='.*nowhere' is not a folder"):
            load("mnist", root=alone / "nowhere")
        monkeypatch.setenv("ELLQ_DATA", str(alone / "gone"))
        with pytest.raises(FileNotFoundError, match=r"ELLQ_DATA='.*gone' is not a folder"):
            load("mnist")
        monkeypatch.setenv("ELLQ_DATA", "")
        assert search_roots() == (alone / "cache",)

    @pytest.mark.parametrize(
        ("wrong", "near"),
        [("minst", "mnist"), ("fashion_mnist", "fashion-mnist"), ("CIFAR10", "cifar10"), ("digit", "digits")],
    )
    def test_an_unknown_name_suggests_the_nearest(self, alone, wrong, near):
        with pytest.raises(ValueError, match=f"name='{wrong}' is not a known data set. Did you mean .*'{near}'"):
            load(wrong)

    def test_a_name_cannot_leave_the_folder(self, alone):
        write_zips(alone / "secret", train=("a",))
        (alone / "data").mkdir()
        with pytest.raises(ValueError, match="not a known data set"):
            load("../secret", root=alone / "data")

    @pytest.mark.parametrize("name", ["digits", "mnist"])
    def test_an_unknown_part_is_refused(self, alone, name):
        with pytest.raises(ValueError, match=r"part='val' .* Choose 'train' or 'test'"):
            load(name, "val")

    def test_a_damaged_file_is_named(self, alone):
        write_mnist(alone / "mnist")
        path = alone / "mnist" / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"{path}.*but holds 3135"):
            load("mnist", root=alone)

    def test_zips_of_class_folders_are_found_by_the_name_of_their_folder(self, alone):
        write_zips(alone / "birds", train=("ant", "bee"), test=("bee",))
        assert "birds" in known_names(alone)
        assert "birds" not in known_names()
        test = load("birds", "test", root=alone)
        assert (test.classes, test.labels.tolist()) == (("ant", "bee"), [1])  # not renumbered for want of ants
        assert load("birds", root=alone).labels.tolist() == [0, 1]


class TestCifarLayouts:
    images = RNG.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    record = np.column_stack([[1, 2], images.reshape(2, -1)]).astype(np.uint8).tobytes()
    batch = pickle.dumps({b"data": images.reshape(2, -1), b"labels": [1, 2]})

    @pytest.mark.parametrize("folder", ["cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"])
    def test_binary_folders(self, alone, folder):
        (alone / folder).mkdir(parents=True)
        for index in range(1, 6):
            (alone / folder / f"data_batch_{index}.bin").write_bytes(self.record)
        (alone / folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
        data = load("cifar10", root=alone, download=False)
        assert np.array_equal(data.images, np.tile(self.images, (5, 1, 1, 1)))
        assert (data.labels.tolist(), data.classes) == ([1, 2] * 5, tuple("abcdefghij"))

    @pytest.mark.parametrize("folder", ["cifar10", "cifar-10-batches-py"])
    def test_python_folders(self, alone, folder):
        (alone / folder).mkdir()
        (alone / folder / "test_batch").write_bytes(self.batch)
        data = load("cifar10", "test", root=alone, download=False)
        assert np.array_equal(data.images, self.images)
        assert data.classes[:2] == ("airplane", "automobile")

    @pytest.mark.parametrize(
        ("name", "member"), [("binary", "cifar-10-batches-bin/test_batch.bin"), ("python", "cifar/test_batch")]
    )
    @pytest.mark.parametrize("folder", ["cifar10", "."])
    def test_archives(self, alone, folder, name, member):
        (alone / folder).mkdir(exist_ok=True)
        content = self.record if name == "binary" else self.batch
        with tarfile.open(alone / folder / f"cifar-10-{name}.tar.gz", "w:gz") as archive:
            header = tarfile.TarInfo(member)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
        assert np.array_equal(load("cifar10", "test", root=alone, download=False).images, self.images)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(alone, monkeypatch):
    """Serve a tiny MNIST on loopback; a function of two addresses registers its mirrors."""
    monkeypatch.setenv("NO_PROXY", "*")
    write_mnist(alone / "served", "test")
    handler = partial(QuietHandler, directory=str(alone / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    base = f"http://127.0.0.1:{server.server_address[1]}"

    def register(*below: str, sha256: str | None = None) -> None:
        remotes = tuple(
            Remote(
                path.name,
                sha256 or hashlib.sha256(path.read_bytes()).hexdigest(),
                tuple(f"{base}/{folder}{path.name}" for folder in below),
            )
            for path in sorted((alone / "served").glob("*-ubyte"))
        )
        monkeypatch.setitem(CATALOGUE, "mnist", replace(CATALOGUE["mnist"], remotes={"test": remotes}))

    yield register
    server.shutdown()
    server.server_close()
    thread.join()


class TestDownload:
    def test_goes_into_the_cache_and_is_used_from_there(self, alone, served, monkeypatch):
        served("")
        assert len(load("mnist", "test")) == 4
        assert len(list((alone / "cache" / "mnist").iterdir())) == 2
        monkeypatch.setattr(dataset_sources.pooch, "retrieve", None)
        assert len(load("mnist", "test")) == 4

    def test_falls_back_to_the_next_mirror(self, alone, served):
        served("absent/", "")
        assert len(load("mnist", "test")) == 4

    def test_is_not_done_unless_allowed(self, alone, served, no_network):
        served("")
        with pytest.raises(FileNotFoundError, match="or pass download=True"):
            load("mnist", "test", download=False)

    def test_refuses_and_discards_a_file_with_the_wrong_hash(self, alone, served):
        served("", sha256="0" * 64)
        with pytest.raises(ValueError, match="'t10k-images-idx3-ubyte' was downloaded with the wrong SHA-256"):
            load("mnist", "test")
        assert not list((alone / "cache" / "mnist").iterdir())

    def test_tells_why_every_mirror_failed(self, alone, served):
        served("absent/", "gone/")
        with pytest.raises(FileNotFoundError, match=r"absent/.*404.*gone/.*404.*Set ELLQ_DATA"):
            load("mnist", "test")

    def test_every_address_has_a_hash_of_its_own(self):
        remotes = [remote for source in CATALOGUE.values() for files in source.remotes.values() for remote in files]
        assert all(len(bytes.fromhex(remote.sha256)) == 32 and len(remote.urls) >= 2 for remote in remotes)
        assert len({remote.sha256 for remote in remotes}) == 3 * 4 + 1


IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(0, 30), st.just(1), st.just(2), st.just(2)))
SHARES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda weights: {f"p{index}": weight / sum(weights) for index, weight in enumerate(weights)}
)


class TestPartition:
    @given(images=IMAGES, shares=SHARES)
    def test_puts_every_example_in_exactly_one_part(self, images, shares):
        labels = np.arange(len(images))
        data = Dataset("made", "train", images, labels, tuple(map(str, range(31))))
        parts = partition(data, **shares)
        assert list(parts) == list(shares)
        together = np.concatenate([part.labels for part in parts.values()])
        assert sorted(together.tolist()) == labels.tolist()
        for part in parts.values():
            assert np.array_equal(part.images, images[part.labels])
            assert (np.diff(part.labels) > 0).all()

    @given(images=IMAGES, shares=SHARES, seed=st.integers(0, 99))
    def test_does_not_depend_on_order_or_company(self, images, shares, seed):
        order = np.random.default_rng(seed).permutation(len(images))[: len(images) * 2 // 3]
        for name, part in partition(make(images[order]), **shares).items():
            whole = {row.tobytes() for row in partition(make(images), **shares)[name].images}
            assert {row.tobytes() for row in part.images} <= whole

    @given(images=IMAGES, shares=SHARES.filter(lambda shares: len(shares) > 1))
    def test_never_separates_equal_images(self, images, shares):
        refuse_overlap(**partition(make(np.concatenate([images, images])), **shares))

    def test_shares_are_met_on_average(self):
        count, shares = 20_000, {"fit": 0.7, "calibration": 0.15, "selection": 0.15}
        parts = partition(make(RNG.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)), **shares)
        for name, share in shares.items():
            margin = 5 * np.sqrt(count * share * (1 - share))
            assert abs(len(parts[name]) - count * share) < margin

    def test_a_part_can_be_split_again(self):
        half = partition(load("digits"), a=0.5, b=0.5)["a"]
        quarters = partition(half, c=0.5, d=0.5)
        assert half.part == "train/a"
        assert quarters["c"].part == "train/a/c"
        assert 0.4 < len(quarters["c"]) / len(half) < 0.6

    def test_never_changes(self):
        # Recorded once, as for the digits.
        parts = partition(load("digits"), fit=0.7, calibration=0.15, selection=0.15)
        assert [len(part) for part in parts.values()] == PARTITION_SIZES
        assert parts["selection"].digest == PARTITION_DIGEST

    @pytest.mark.parametrize(
        "shares",
        [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.0, "b": 0.0}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}],
    )
    def test_refuses_shares_that_are_not_positive_or_do_not_sum_to_one(self, shares):
        with pytest.raises(ValueError, match="Pass positive shares that sum to 1"):
            partition(load("digits"), **shares)

    def test_sixty_thousand_images_take_a_moment(self):
        data = make(np.zeros((60_000, 1, 28, 28), np.uint8))
        began = time.process_time()
        partition(data, a=0.5, b=0.5)
        assert time.process_time() - began < 2


class TestRefuseOverlap:
    def test_names_the_two_sets_and_how_many_they_share(self):
        images = RNG.integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)
        first, second, third = make(images[:4]), make(images[4:]), make(images[2:4])
        refuse_overlap(calibration=first, certification=second)
        with pytest.raises(ValueError, match="'calibration' and 'selection' share 2 examples"):
            refuse_overlap(calibration=first, certification=second, selection=third)
        with pytest.raises(ValueError, match=r"'a' and 'b' share 1 example\. "):
            refuse_overlap(a=first, b=make(images[3:4]))

    def test_does_not_look_at_labels(self):
        images = np.zeros((1, 1, 2, 2), np.uint8)
        other = Dataset("other", "test", images, np.array([1]), ("a", "b"))
        with pytest.raises(ValueError, match="share 1 example"):
            refuse_overlap(a=make(images), b=other)

    def test_needs_two_sets(self):
        with pytest.raises(ValueError, match="only two or more"):
            refuse_overlap(a=load("digits"))


class TestOfficialFiles:
    @pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
    @pytest.mark.parametrize(("part", "count"), [("train", 60_000), ("test", 10_000)])
    def test_relatives_of_mnist_have_their_shapes_and_counts(self, name, part, count):
        data = official(name, part)
        assert data.images.shape == (count, 1, 28, 28)
        counts = np.bincount(data.labels, minlength=10)
        if name == "mnist":  # as published: the digit 1 is the commonest, 5 the rarest
            assert (counts.argmax(), counts.argmin()) == (1, 5)
            assert counts[0] == {"train": 5923, "test": 980}[part]
        else:
            assert (counts == count // 10).all()

    def test_cifar10_is_the_official_one_bit_for_bit(self):
        data = official("cifar10", "train")
        assert (np.bincount(data.labels) == 5000).all()
        assert " ".join(data.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
        records = np.column_stack([data.labels.astype(np.uint8), data.images.reshape(len(data), -1)])
        # md5 of data_batch_1.bin to data_batch_5.bin in the official archive
        assert [hashlib.md5(batch.tobytes()).hexdigest() for batch in records.reshape(5, -1)] == [
            "5dd7e06a14cb22eb9f671a540d1b7c25",
            "5ea93a67294ea407fff1d09f752e9692",
            "942cd6a4bcdd0dd3c604fbe906cb4421",
            "ae636b3ba5c66a11e91e8cb52e771fcb",
            "53f37980c15c3d472c316c40844f3f0d",
        ]

    def test_cifar10_test_has_a_thousand_of_each_class(self):
        data = official("cifar10", "test")
        assert data.images.shape == (10_000, 3, 32, 32)
        assert (np.bincount(data.labels) == 1000).all()

    def test_cifar10_as_jpeg_shows_the_same_classes(self):
        data = official("cifar10-jpeg", "test")
        assert data.images.shape == (10_000, 3, 32, 32)
        assert (np.bincount(data.labels) == 1000).all()
        assert data.classes == official("cifar10", "test").classes
