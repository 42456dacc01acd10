"""Named weights: checking before writing, tied names, release, checksums; and the layout of buckets."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch

from milepost_engine import buckets
from milepost_engine.errors import InvalidRequest, UpdateRefused
from milepost_engine.weights import TensorSpec, WeightStore, parse_dtype

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


@pytest.fixture
def store(model):
    return WeightStore(model)


def _spec(name, shape, dtype=torch.float32):
    return TensorSpec(name, dtype, shape)


def test_tied_names_are_one_tensor_under_two_names(store, model):
    assert HEAD not in store.names
    store.check([_spec(HEAD, (24, 32)), _spec(EMBED, (24, 32))])
    store.write([(HEAD, torch.full((24, 32), 3.0))])
    assert float(model.model.embed_tokens.weight.min()) == 3.0


@pytest.mark.parametrize(
    "specs, parts",
    [
        ([_spec("model.norm.weigth", (32,))], ["model.norm.weigth", "nearest", NORM]),
        ([_spec(NORM, (16,))], [NORM, "[16]", "[32]"]),
        ([_spec(NORM, (32,), torch.int8)], [NORM, "int8", "float32"]),
        ([_spec(NORM, (32,)), _spec(NORM, (32,))], [NORM, "twice"]),
    ],
)
def test_what_does_not_fit_is_named(store, specs, parts):
    with pytest.raises(UpdateRefused) as caught:
        store.check(specs)
    assert all(part in str(caught.value) for part in parts)


def test_completeness_counts_tied_names_once(store):
    specs = [_spec(name, tuple(store._specs[name].shape)) for name in store.names]
    store.check(specs, complete=True)
    with_head = [spec for spec in specs if spec.name != EMBED] + [_spec(HEAD, (24, 32))]
    store.check(with_head, complete=True)
    with pytest.raises(UpdateRefused, match="1 tensors of the model are missing"):
        store.check(specs[1:], complete=True)


def test_checksum_is_the_documented_one(store, model):
    sums = store.checksum()
    overall = hashlib.sha256()
    for name in sorted(sums.tensors):
        tensor = model.get_parameter(name)
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert sums.tensors[name] == digest
        shape = ",".join(map(str, tensor.shape))
        overall.update(f"{name}\0float32\0{shape}\0{digest}\n".encode())
    assert sums.overall == overall.hexdigest()
    store.write([(NORM, torch.zeros(32))])
    assert store.checksum().overall != sums.overall


def test_release_frees_and_resume_waits_for_every_tensor(store):
    held = store.size_bytes
    before = store.checksum().overall
    saved = [(name, store._tensors[name].clone()) for name in store.names]
    store.release()
    assert store.size_bytes == 0
    for refused in (store.checksum, store.snapshot, lambda: store.read(NORM, rows=1)):
        with pytest.raises(InvalidRequest, match="released"):
            refused()
    with pytest.raises(UpdateRefused, match="released"):
        store.check([_spec(NORM, (32,))])
    store.resume()
    assert store.size_bytes == held
    assert store.state == "empty"
    store.write(saved[:-1])
    assert (store.state, store.num_unwritten) == ("empty", 1)
    store.write(saved[-1:])
    assert store.state == "present"
    assert store.checksum().overall == before


def test_tied_weights_stay_tied_over_release(store, model):
    store.release()
    store.resume()
    store.write([(EMBED, torch.full((24, 32), 2.0))])
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_dtype_names():
    assert parse_dtype("torch.bfloat16", where="x") is torch.bfloat16
    for bad in ("float31", 5, None, ""):
        with pytest.raises(UpdateRefused, match="dtypes"):
            parse_dtype(bad, where="dtypes[0]")


def test_a_bucket_is_read_back_whatever_the_alignment():
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "c": torch.tensor(7, dtype=torch.int64),
        "d": torch.zeros((0, 4)),
    }
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    data = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()])
    assert buckets.total_bytes(specs) == len(data)
    for name, tensor in buckets.split(data, specs):
        assert torch.equal(tensor, tensors[name])
        assert tensor.shape == tensors[name].shape


@pytest.mark.parametrize(
    "names, dtypes, shapes, named",
    [
        ([], [], [], "0, 0 and 0"),
        (["a"], ["float32"], [], "1, 1 and 0"),
        ([""], ["float32"], [[1]], "names[0]"),
        ([3], ["float32"], [[1]], "names[0]"),
        (["a"], ["f"], [[1]], "dtypes[0]"),
        (["a"], ["float32"], ["1"], "shapes[0]"),
        (["a"], ["float32"], [[1.0]], "shapes[0]"),
        (["a"], ["float32"], [[-1]], "shapes[0]"),
    ],
)
def test_bad_headers_are_refused_by_field(names, dtypes, shapes, named):
    with pytest.raises(UpdateRefused) as caught:
        buckets.header(names, dtypes, shapes)
    assert named in str(caught.value)
